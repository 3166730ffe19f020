"""From a client's words to token ids: every check of a request that needs no queue.

Raises the `EngineError` that the client is to be told. Slow text work (a tokenizer read for the
first time, a long prompt) runs on a thread, so that it delays nobody else's tokens.
"""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

from engine import api, sampling
from engine.config import Config
from engine.delivery import Ask
from engine.errors import EngineFailed, InvalidRequest, ModelNotFound, TextError, Unauthorized
from engine.exactness import approximation_of
from engine.keys import ApiKeys
from engine.state import Cluster, Served
from engine.text import Texts, VariantText
from zoo.errors import ZooError
from zoo.manifest import ChainDigest, Variant

# Below this many characters a prompt is encoded in less time than a thread takes to hear of it.
LONG_PROMPT = 4096
# What a seed not given is drawn from; clients may give any 64-bit integer.
SEED_BITS = 63


class Intake:
    """Checks and encodes requests. `refresh` looks for changes of the catalog at once."""

    def __init__(
        self,
        config: Config,
        keys: ApiKeys,
        texts: Texts,
        cluster: Cluster,
        refresh: Callable[[], None],
    ) -> None:
        self._config = config
        self._keys = keys
        self._texts = texts
        self._cluster = cluster
        self._refresh = refresh
        self._known: WeakValueDictionary[tuple[str, ChainDigest], VariantText] = (
            WeakValueDictionary()
        )
        # One thread: `Texts` is not made for several.
        self._reader = ThreadPoolExecutor(1, "text")

    @property
    def needs_key(self) -> bool:
        """Whether clients must send an API key."""
        return bool(self._keys)

    def tenant(self, api_key: str) -> str:
        """Whose key it is. Raises Unauthorized."""
        tenant = self._keys.tenant(api_key)
        if tenant is None:
            raise Unauthorized("This engine asks for an API key and the one given is not known.")
        return tenant

    def find(self, name: str) -> Served:
        """The variant of that name, even if it was added a moment ago. Raises ModelNotFound."""
        if name not in self._cluster.variants:
            self._refresh()
        served = self._cluster.variants.get(name)
        if served is None:
            raise ModelNotFound(f"The model {_quoted(name)} does not exist.", "model")
        return served

    def context(self, variant: Variant) -> int:
        """Longest sequence that this engine serves of a variant."""
        return self._config.served_context(variant.context)

    def approximation(self, variant: Variant) -> api.Approximation | None:
        """What keeps this engine's answers of a variant from being exact, if anything does."""
        return approximation_of(variant, self._config)

    async def prepare(self, submit: api.Submit) -> Ask:
        """The request in this engine's terms, or the EngineError that says what is wrong."""
        tenant = self.tenant(submit.api_key)
        served = self.find(submit.model)
        variant = served.variant
        sampling.check(submit.sampling, variant.vocabulary)
        text = await self.text(variant)
        prompt = await self._prompt_ids(submit, variant, text)
        if self._cluster.variants.get(submit.model) is not served:
            # The name was given to something else while the prompt was encoded.
            return await self.prepare(submit)
        if submit.sampling.stop and not text.has_tokenizer:
            raise InvalidRequest("This model has no tokenizer: use stop_token_ids.", "stop")
        context = self.context(variant)
        capacity = self._cluster.capacity(served.chain)
        wanted = submit.sampling.max_tokens
        max_tokens = sampling.answer_budget(len(prompt), wanted, context, capacity)
        seed = submit.sampling.seed
        return Ask(
            model=submit.model,
            variant=variant,
            chain=served.chain,
            tenant=tenant,
            salt=self._keys.salt(tenant),
            priority=submit.priority,
            context=context,
            prompt=prompt,
            sampling=submit.sampling,
            wire_sampling=sampling.to_wire(
                submit.sampling,
                eos=variant.eos,
                seed=secrets.randbits(SEED_BITS) if seed is None else seed,
                max_tokens=max_tokens,
            ),
            text=text,
            approximation=self.approximation(variant),
        )

    async def text(self, variant: Variant) -> VariantText:
        """The text side of a variant. Raises EngineFailed if its files are damaged."""
        key = (variant.name, variant.chain)
        text = self._known.get(key)
        if text is None:
            loop = asyncio.get_running_loop()
            try:
                text = await loop.run_in_executor(self._reader, self._texts.of, variant)
            except (TextError, ZooError) as error:
                raise EngineFailed(
                    f"The text files of {variant.name} are of no use: {error}"
                ) from (error)
            self._known[key] = text
        return text

    async def encode(
        self,
        text: VariantText,
        prompt: str | None,
        messages: list[dict[str, Any]] | None,
        *,
        add_special_tokens: bool = True,
        template: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a text or of chat messages. Raises InvalidRequest."""
        if (prompt is None) == (messages is None):
            raise InvalidRequest("Give either prompt or messages, and not both.", "prompt")
        try:
            if messages is not None:
                # The template writes the special tokens itself.
                prompt, add_special_tokens = text.render(messages, template or {}), False
            if prompt is None or len(prompt) < LONG_PROMPT:
                return text.encode(prompt or "", add_special_tokens)
            return await asyncio.to_thread(text.encode, prompt, add_special_tokens)
        except TextError as error:
            raise InvalidRequest(
                str(error), "prompt" if messages is None else "messages"
            ) from error

    def close(self) -> None:
        """Let the thread go."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def _prompt_ids(
        self, submit: api.Submit, variant: Variant, text: VariantText
    ) -> list[int]:
        if isinstance(submit.prompt, list) and submit.messages is None:
            prompt = submit.prompt
        else:
            given = submit.prompt if submit.prompt is None else str(submit.prompt)
            prompt = await self.encode(
                text,
                given,
                submit.messages,
                add_special_tokens=submit.add_special_tokens,
                template=submit.template,
            )
        if not prompt:
            raise InvalidRequest("The prompt must hold at least one token.", "prompt")
        # A tokenizer, too, may know tokens that its model has no embedding for.
        if min(prompt) < 0 or max(prompt) >= variant.vocabulary:
            sampling.check_ids("prompt", prompt, variant.vocabulary)
        return prompt


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")
