from benchmarks.fewer_steps import measure
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline


def test_every_way_has_its_steps_and_its_time(pipe: MarsPipeline) -> None:
    found = measure(pipe, Sampling(temperature=1.0, guidance=4.0), repeats=1)["ways"]
    assert len(found) == 12
    assert found["window 1"]["steps"] == found["stop 0.5"]["steps"] == 6
    assert found["window 8"]["steps"] < 6
    assert found["window 1"]["the same codes"] == found["window 1"]["times the plain way"] == 1
    assert 0.5 < found["stop 0.5"]["the same codes"] < 1
    assert found["stop 0"]["the same codes"] < found["stop 0.75"]["the same codes"]
