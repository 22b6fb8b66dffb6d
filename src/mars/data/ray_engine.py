"""Encoding on a cluster with Ray Data: a task per shard, which reads and writes the shard itself."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mars.data.code_folder import Engine, ShardWriter, local_engine
from mars.errors import DataError, MarsError


def ray_engine(*, workers: int) -> Engine:
    """Shards are encoded by tasks of Ray Data: on the cluster that RAY_ADDRESS names, else on this machine.

    Each task is the local engine with one process for one shard, so a picture that ends its process is named here too.
    Pictures and codes must lie where every machine of the cluster finds them under the same path.

    Args:
        workers: at most so many tasks at once, each on one core.

    Raises:
        DataError: if Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise DataError("the engine `ray` needs Ray Data; install it: pip install 'mars-t2i[ray]'") from None

    def encode(shards: Sequence[Path], writer: ShardWriter, told: Callable[[int], None]) -> None:
        def task(row: dict[str, Any]) -> dict[str, Any]:
            counts: list[int] = []
            try:
                local_engine(workers=1)([Path(row["item"])], writer, counts.append)
            except MarsError as error:  # Ray would hide what it says
                return {"pictures": 0, "error": str(error)}
            return {"pictures": sum(counts), "error": ""}

        ours = not ray.is_initialized()
        try:
            ray.init(
                ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here, and the rest is chatter
            ray.data.DataContext.get_current().enable_progress_bars = False
            jobs = ray.data.from_items([str(shard) for shard in shards], override_num_blocks=len(shards))
            for row in jobs.map(task, compute=ray.data.TaskPoolStrategy(size=workers), num_cpus=1).iter_rows():
                if row["error"]:
                    raise DataError(row["error"])
                told(row["pictures"])
        except MarsError:
            raise
        except Exception as error:  # Ray has no class for a cluster that does not start
            raise DataError(f"Ray could not encode {shards[0].parent}: {' '.join(str(error).split())[:300]}") from error
        finally:
            if ours:
                ray.shutdown()

    return encode
