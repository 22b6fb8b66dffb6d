"""What may be asked, with the names of the OpenAI API, and of vllm-omni where that has none."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mars.server.pictures import Format

Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Without the character that files cannot hold."""


class Asked(BaseModel):
    """What all requests share: unknown parameters and numbers that are none are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class WithNumbers(Asked):
    """A request whose numbers may not be true or false."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: object, info: object) -> object:
        if isinstance(value, bool) and getattr(info, "field_name", "") != "stream":
            raise ValueError("must not be true or false")
        return value


class DrawFields(WithNumbers):
    """What all requests for pictures share."""

    model: str | None = Field(None, description="The id that /v1/models tells; default: the only one.")
    n: int | None = Field(None, ge=1, description="Pictures, one by default.")
    size: str | None = Field(None, description="WIDTHxHEIGHT, a size that the model was trained on, or auto.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="url is a data URL.")
    user: str | None = Field(None, max_length=512, description="Noted in the log.")
    safety_identifier: str | None = Field(None, max_length=512, description="The newer name of user.")
    seed: int | None = Field(None, ge=0, lt=2**53, description="The same seed draws the same picture.")
    negative_prompt: Text | None = Field(None, description="What guidance moves away from.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="1 is no guidance.")
    guidance_stop: float | None = Field(None, ge=0, le=1, description="Guide this share of the codes, from the first.")
    temperature: float | None = Field(None, ge=0, description="0 takes the likeliest code.")
    top_k: int | None = Field(None, ge=0, description="0 is all codes.")
    top_p: float | None = Field(None, gt=0, le=1)
    candidates: int | None = Field(None, ge=1, description="Draw so many, keep what the model finds likeliest.")


class StreamFields(DrawFields):
    """What generations and edits share."""

    output_format: Format | None = Field(None, description="png by default.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp, 100 by default.")
    stream: bool | None = Field(None, description="Server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of each picture, with stream.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Changes nothing: there is one quality."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Changes nothing: the server decides.")


class GenerationRequest(StreamFields):
    """Pictures for a prompt."""

    prompt: Text = Field(description="What to draw, in English or Chinese.")


class EditForm(StreamFields):
    """Part of a picture drawn anew."""

    prompt: Text = Field("", description="What the whole picture is to show.")
    image: UploadFile | None = Field(None, description="PNG, JPEG or WebP.")
    images: list[UploadFile] | None = Field(None, alias="image[]", description="The same; one is all there may be.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Changes nothing.")
    mask: UploadFile | None = Field(
        None,
        description="As large as the image, transparent (or white) where it is drawn anew; default: the image's own "
        "transparency.",
    )


class VariationForm(DrawFields):
    """A picture in other variants."""

    image: UploadFile = Field(description="PNG, JPEG or WebP.")
    prompt: Text = Field("", description="What it shows.")
    strength: float = Field(0.3, gt=0, le=1, description="The share of its codes that are drawn anew.")


class TextContent(Asked):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Asked):
    """Where an image is."""

    url: str = Field(
        description="A data URL; the server fetches nothing.",
        json_schema_extra={"pattern": "^data:image/(png|jpeg|jpg|webp);base64,[A-Za-z0-9+/]*={0,2}$"},
    )
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Changes nothing.")


class ImageContent(Asked):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class Message(Asked):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Content], Field(min_length=1, max_length=32)]
    name: str | None = None

    @property
    def parts(self) -> list[TextContent | ImageContent]:
        """The content, a plain text as a list of one."""
        return [TextContent(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(Asked):
    """How a stream ends."""

    include_usage: bool = False


class ChatRequest(WithNumbers):
    """A chat: with text alone the base LLM answers, a picture is captioned, with images asked for both are made."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=256, description="The last one is the user's.")
    modalities: list[Literal["text", "image"]] = Field(
        ["text"], min_length=1, max_length=2, description="With image, the model writes and paints in turns."
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_images: int | None = Field(None, ge=1, description="Pictures of a joint answer, 4 by default.")
    temperature: float | None = Field(None, ge=0, le=2, description="Of text; by default 0: the likeliest.")
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Of pictures.")
    seed: int | None = Field(None, ge=0, lt=2**53)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    language: Literal["en", "zh"] | None = Field(
        None, description="Of a caption; default: Chinese if the question has Chinese characters."
    )
    n: Literal[1] | None = None
    user: str | None = Field(None, max_length=512, description="Noted in the log.")
    safety_identifier: str | None = Field(None, max_length=512, description="The newer name of user.")
