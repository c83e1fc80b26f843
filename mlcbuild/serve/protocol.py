"""What requests may say: OpenAI's fields that mean something here, and bounds for their sizes.

A field that would be ignored is an error, except those that only label a request.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.sampling import SETTINGS

MOST_TEXTS = 256  # prompts or inputs of a request
Stop = Annotated[str, Field(max_length=1024)]  # each is looked for after every token
R = TypeVar("R", bound="Request")
Ids = Annotated[list[int], Field(min_length=1)]
Texts = str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
Tokens = Ids | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]


class Refused(MlcBuildError):
    """A request that is answered with an error of this status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Strict(BaseModel):
    """Fields that are known. One that is null is one that was left out, whatever its name: clients send them so."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Request(Strict):
    model: str
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Writing(Request):
    """What both ways to write a text take. A setting that is None is the package's own."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[int, float], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of runtime.sampling.Sampling that the request gives."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not None}


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Function(Strict):
    """What may be called; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function


class OnlyName(Strict):
    name: str


class Chosen(Strict):
    """`tool_choice` that names the function to call."""

    type: Literal["function"] = "function"
    function: OnlyName


class Called(BaseModel):
    name: str
    arguments: str = "{}"

    @property
    def values(self) -> Any:
        """Raises MlcBuildError where the arguments are no JSON object."""
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise MlcBuildError(f"messages: the arguments of a call of {self.name} are no JSON object")
        return found


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, str]:
        """As a template takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Schema(BaseModel):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """What an answer must fit; None: it is free. Raises MlcBuildError where the schema is missing."""
        if self.type == "json_schema" and self.json_schema is None:
            raise MlcBuildError("response_format.json_schema: Field required")
        kinds = {"text": None, "json_object": {"type": "object"}}
        return self.json_schema.content if self.json_schema else kinds[self.type]


class ChatRequest(Writing):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None

    @property
    def about_tools(self) -> bool:
        """Whether the prompt tells of tools, or of calls that were made."""
        return bool(self.tools) or any(message.tool_call_id or message.tool_calls for message in self.messages)

    @property
    def offered(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> list[Tool]:
        """Tools one of which must be called; none: the model may choose.

        Raises MlcBuildError where there is no such tool, where the answer must fit a schema, too, and for a tool that
        shall be strict although nothing holds a free answer to its schema.
        """
        choice = self.tool_choice
        if choice == "required":
            found = self.offered
        elif isinstance(choice, Chosen):
            found = [tool for tool in self.offered if tool.function.name == choice.function.name]
        else:
            if any(tool.function.strict for tool in self.offered):
                raise MlcBuildError("tools: `strict` needs a `tool_choice` of `required` or of a function by name")
            return []
        if not found:
            if not isinstance(choice, Chosen):
                raise MlcBuildError("tool_choice: `required` needs `tools`: name at least one")
            known = ", ".join(tool.function.name for tool in self.offered) or "none"
            raise MlcBuildError(f"tool_choice: no tool is called {choice.function.name}; there are: {known}")
        if self.response_format is not None and self.response_format.type != "text":
            raise MlcBuildError("tool_choice: an answer that must be a call cannot fit a response_format as well")
        return found

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Writing):
    prompt: Texts | Tokens
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(Request):
    input: Texts | Tokens
    encoding_format: Literal["float", "base64"] = "float"

    @field_validator("input")
    @classmethod
    def _texts(cls, value: str | list[Any]) -> str | list[Any]:
        if not isinstance(value, str) and not isinstance(value[0], str):
            raise ValueError("token ids are not taken here: send texts")
        return value


def parse(kind: type[R], body: bytes) -> R:
    """A request from JSON. Raises MlcBuildError that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # A value that may be of several kinds has a problem for each: what is wrong inside one of them says most.
        said = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
        where = ".".join(str(part) for part in said["loc"] if str(part).isalnum() or "_" in str(part))
        raise MlcBuildError(f"{where}: {said['msg']}" if where else said["msg"]) from None


def several(given: str | list[Any]) -> list[Any]:
    """The prompts of a request: one text, one list of ids, or several of either."""
    one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if one else list(given)
