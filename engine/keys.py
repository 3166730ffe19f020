"""API keys and the tenants they stand for."""

import hashlib
import hmac
from pathlib import Path

import msgspec

from engine.config import ConfigError

ANYONE = "anyone"


class ApiKeys:
    """Keys of one file. Keys are kept and looked up by their SHA-256, so that neither memory nor
    the time of a comparison tells anything of them."""

    def __init__(self, tenants: dict[str, str]) -> None:
        self._tenants = {_hash(key): tenant for key, tenant in tenants.items()}

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. Without keys everyone is the same tenant."""
        if not self._tenants:
            return ANYONE
        digest = _hash(key)
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def salt(self, tenant: str) -> int:
        """What keeps a tenant's pages apart in the prefix cache; 0 where there are no tenants."""
        if not self._tenants:
            return 0
        return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest()) >> 1


def read_keys(path: str) -> ApiKeys:
    """Keys from a file of `key [tenant]` lines (# begins a comment), or a JSON object of tenants by
    key. A key without a tenant is its own. An empty path: no keys. Raises ConfigError."""
    if not path:
        return ApiKeys({})
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from error
    is_json = text.lstrip().startswith("{")
    tenants = _from_json(path, text) if is_json else _from_lines(path, text)
    if not tenants:
        raise ConfigError(f"the key file {path} holds no key: write one on each line")
    return ApiKeys(tenants)


def _from_json(path: str, text: str) -> dict[str, str]:
    try:
        tenants = msgspec.json.decode(text, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the key file {path} is not a JSON object of key: tenant") from error
    return {key: tenant or _own_tenant(key) for key, tenant in tenants.items()}


def _from_lines(path: str, text: str) -> dict[str, str]:
    tenants: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise ConfigError(f"line {number} of {path} has more than a key and a tenant")
        if words:
            tenants[words[0]] = words[1] if len(words) == 2 else _own_tenant(words[0])
    return tenants


def _own_tenant(key: str) -> str:
    return "key-" + _hash(key).hex()[:12]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
