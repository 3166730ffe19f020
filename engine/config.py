"""Every setting of `launch`: its default and its meaning stand beside the field, and nowhere else.

A value comes from the command line, else from the TOML file, else from the variable
BLOCKLLM_<FIELD>, else from here. Flags, variables and TOML keys are made from the fields of
`Config`, so a field is all that a new setting needs. A wrong value is a ConfigError: one sentence
that says what to do.
"""

import argparse
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

ENV_PREFIX = "BLOCKLLM_"
KNOWN_VARIABLES = frozenset({"BLOCKLLM_HOME", "BLOCKLLM_API_KEY"})

Count = Annotated[int, Meta(ge=1)]
Amount = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Patience = Annotated[float, Meta(ge=1)]


class ConfigError(Exception):
    """A setting is wrong; the message is one sentence for the person who set it."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine, fixed for its life."""

    zoo: Annotated[str, Meta(description="folder of the zoo; empty: $BLOCKLLM_HOME/zoo")] = ""
    http: Annotated[str, Meta(description='HOST:PORT of the HTTP server; "none": no HTTP')] = (
        "127.0.0.1:8000"
    )
    zmq: Annotated[str, Meta(description="ZeroMQ endpoint for clients")] = "tcp://127.0.0.1:5570"
    api_keys: Annotated[
        str, Meta(description="file of keys, one `key [tenant]` a line or JSON; empty: no keys")
    ] = ""
    allow_insecure_bind: Annotated[
        bool, Meta(description="serve an address others can reach although there are no API keys")
    ] = False

    device: Annotated[
        str, Meta(description="where the blocks run: auto, cpu, cuda, or one device such as cuda:0")
    ] = "auto"
    workers: Annotated[
        Count | Literal["auto"], Meta(description="worker processes; auto: one for each device")
    ] = "auto"
    ops: Annotated[str, Meta(description="kernels of the workers; auto: the fastest there are")] = (
        "auto"
    )
    attention_backend: Annotated[
        Literal["auto", "flashinfer", "triton"],
        Meta(description="whose kernels attend on GPUs; auto: FlashInfer's where they can"),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"],
        Meta(description="dummy: random weights of the variants' shapes, for benchmarks"),
    ] = "auto"
    threads: Annotated[Amount, Meta(description="threads of one worker; 0: its share of cores")] = 0

    max_num_seqs: Annotated[Count, Meta(description="requests that run at once on one worker")] = (
        256
    )
    max_num_batched_tokens: Annotated[
        Amount, Meta(description="tokens of one batch; 0: what suits the device")
    ] = 0
    max_model_len: Annotated[
        Amount, Meta(description="longest prompt and answer together; 0: what the model has")
    ] = 0
    max_num_queued_reqs: Annotated[
        Count, Meta(description="requests that may wait; more are refused as overloaded")
    ] = 1024
    kv_cache_memory_bytes: Annotated[
        Amount,
        Meta(
            description="memory of one worker for KV pages, taken from the start; 0: the worker "
            "chooses a ceiling"
        ),
    ] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(
            description="what layers multiply; auto: float32, on GPUs what the weights are; "
            "bfloat16: faster on CPUs with AVX-512 BF16 or AMX, answers are approximate"
        ),
    ] = "auto"
    weights: Annotated[
        Literal["exact", "int8", "int4"],
        Meta(description="what linear layers are kept in; int8, int4: less memory, approximate"),
    ] = "exact"
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="what KV pages hold; bfloat16: half the memory, answers are approximate"),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float,
        Meta(gt=0, le=1, description="share of a GPU's memory for weights and KV pages together"),
    ] = 0.9
    weight_memory_bytes: Annotated[
        Amount, Meta(description="memory of one worker for weights; 0: the worker chooses")
    ] = 0
    block_size: Annotated[Count, Meta(description="tokens of one KV page")] = 16
    enable_prefix_caching: Annotated[
        bool, Meta(description="keep the pages of past prompts for equal beginnings")
    ] = True

    num_speculative_tokens: Annotated[
        Amount,
        Meta(
            description="tokens that are guessed ahead of a stream, from what was said before, and "
            "verified in one step where that pays (on CPUs, 7 at most): answers stay the same; "
            "0: none"
        ),
    ] = 7

    shutdown_timeout: Annotated[
        Seconds, Meta(description="seconds that running requests get to end before the exit")
    ] = 30.0
    worker_timeout: Annotated[
        Patience, Meta(description="seconds of silence after which a worker is taken for stuck")
    ] = 60.0
    load_timeout: Annotated[Patience, Meta(description="the same while a worker loads weights")] = (
        600.0
    )
    samples: Annotated[
        str, Meta(description="JSON file of chat messages by variant; each is asked once at start")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least level of log lines")
    ] = "info"
    log_json: Annotated[bool, Meta(description="log lines as JSON")] = False
    vllm_metrics: Annotated[
        bool, Meta(description="metrics under the names of vLLM, too, for existing dashboards")
    ] = False

    def served_context(self, context: int) -> int:
        """Longest sequence that is served of a variant that has `context`."""
        return min(context, self.max_model_len or context)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Host and port of the HTTP server; None: there is none."""
        if self.http in ("", "none"):
            return None
        return parse_address(self.http)


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the HTTP process is started with (JSON on its command line).

    It connects to `endpoint` as any client does and, once it listens, prints `ready <port>`.
    Clients' API keys pass through it: the engine alone checks them.
    """

    host: str
    port: int
    endpoint: str
    max_body_bytes: int = 8 * 1024 * 1024
    log_level: str = "info"
    log_json: bool = False


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f'"{text}" is not an address: write HOST:PORT, such as 127.0.0.1:8000')
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field. Flags have no default: what is not given stays out of the way."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with the keys below")
    for field in msgspec.structs.fields(Config):
        meaning, value = _describe(field)
        shown = "none" if field.default == "" else str(field.default).lower()
        flag = "--" + field.name.replace("_", "-")
        text = f"{meaning} (default: {shown})".replace("%", "%%")
        if field.type is bool or isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, metavar=value, help=text)


def resolve(flags: Mapping[str, object], environ: Mapping[str, str]) -> Config:
    """The settings in force. `flags` maps fields (and "config") to what was given, or to None."""
    given = {name: value for name, value in flags.items() if value is not None}
    path = given.pop("config", None)
    values: dict[str, object] = {}
    for name, text in _variables(environ).items():
        values[name] = _convert(
            name, text, f"the variable {ENV_PREFIX}{name.upper()}", strict=False
        )
    for name, value in (_read(Path(str(path))) if path else {}).items():
        values[name] = _convert(name, value, f'"{name}" in {path}', strict=True)
    for name, text in given.items():
        values[name] = _convert(name, text, "--" + name.replace("_", "-"), strict=False)
    config = msgspec.convert(values, Config)
    _check(config)
    return config


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that nothing reads: usually a slip of the pen."""
    fields = {ENV_PREFIX + name.upper() for name in Config.__struct_fields__}
    mine = {name for name in environ if name.startswith(ENV_PREFIX)}
    return sorted(mine - fields - KNOWN_VARIABLES)


def _describe(field: msgspec.structs.FieldInfo) -> tuple[str, str]:
    hint = get_type_hints(Config, include_extras=True)[field.name]
    notes = [note.description for note in get_args(hint)[1:] if isinstance(note, Meta)]
    value = "|".join(_choices(hint)) or field.name.rpartition("_")[2].upper()
    return next(note for note in reversed(notes) if note), value


def _choices(hint: object) -> tuple[str, ...]:
    inner = get_args(hint)[0]
    return get_args(inner) if get_origin(inner) is Literal else ()


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    names = {name: ENV_PREFIX + name.upper() for name in Config.__struct_fields__}
    return {name: environ[variable] for name, variable in names.items() if variable in environ}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {path} is not TOML: {error}") from error
    unknown = sorted(set(values) - set(Config.__struct_fields__))
    if unknown:
        known = ", ".join(Config.__struct_fields__)
        raise ConfigError(f'{path} has the unknown key "{unknown[0]}": known are {known}')
    return values


def _convert(name: str, value: object, where: str, *, strict: bool) -> object:
    hint = get_type_hints(Config, include_extras=True)[name]
    try:
        return msgspec.convert(value, hint, strict=strict)
    except msgspec.ValidationError as error:
        choices = _choices(hint)
        advice = "write one of " + ", ".join(choices) if choices else str(error)
        raise ConfigError(f"{where} is wrong, {value!r} was given: {advice}") from error


def _check(config: Config) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ConfigError(
            f'"{config.device}" is not a device: write one of auto, cpu, cuda, cuda:0 for --device'
        )
    address = config.http_address
    scheme, separator, rest = config.zmq.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not rest:
        raise ConfigError(
            f'"{config.zmq}" is not an endpoint: write tcp://HOST:PORT or ipc://PATH for --zmq'
        )
    hosts = [parse_address(rest)[0]] if scheme == "tcp" else []
    hosts += [address[0]] if address else []
    if config.api_keys or config.allow_insecure_bind:
        return
    for host in hosts:
        if not is_loopback(host):
            raise ConfigError(
                f"{host} can be reached by other machines and there are no API keys: give "
                "--api-keys FILE, or --allow-insecure-bind if everyone may use it"
            )
