"""Answers to every request that starts nothing: models, status, metrics, tokens of a text."""

from collections.abc import Callable
from typing import Any

from engine import api
from engine.errors import InvalidRequest, TextError
from engine.intake import Intake
from engine.metrics import Metrics
from engine.sampling import check_ids
from engine.snapshot import snapshot
from engine.state import Cluster, Served
from zoo.errors import ZooError
from zoo.manifest import ObjectDigest, Variant
from zoo.store import Store

Query = api.ListModels | api.GetStatus | api.GetMetrics | api.Tokenize | api.Detokenize


class Queries:
    """Reads the cluster for clients. `about` gives what is known of the engine itself."""

    def __init__(
        self,
        cluster: Cluster,
        intake: Intake,
        metrics: Metrics,
        store: Store,
        about: Callable[[], dict[str, Any]],
    ) -> None:
        self._cluster = cluster
        self._intake = intake
        self._metrics = metrics
        self._about = about
        self._store = store
        # Whether a tokenizer's configuration holds a template, read once for all that share it.
        self._templates: dict[ObjectDigest, bool] = {}

    async def answer(self, query: Query) -> api.Reply:
        """The reply. Raises the EngineError that the client is to be told."""
        match query:
            case api.GetMetrics():
                return api.MetricsReply(query.id, self._metrics.render())
            case api.GetStatus():
                return api.StatusReply(query.id, self._status(query.api_key))
            case api.ListModels():
                self._intake.tenant(query.api_key)
                models = [self._model(served) for served in self._cluster.variants.values()]
                return api.Models(query.id, models)
            case api.Tokenize():
                return await self._tokenize(query)
            case api.Detokenize():
                return await self._detokenize(query)

    def _status(self, api_key: str) -> dict[str, Any]:
        """Without a key only what a probe needs: it says no more than /health does."""
        about = self._about()
        if not api_key and self._intake.needs_key:
            return {name: about[name] for name in ("state", "ready", "version")}
        self._intake.tenant(api_key)
        return about | snapshot(self._cluster, self._intake.approximation)

    def _model(self, served: Served) -> api.Model:
        variant = served.variant
        return api.Model(
            id=variant.name,
            created=int(variant.created),
            parent=variant.base,
            root=variant.source,
            kind=variant.kind,
            family=variant.family,
            context=self._intake.context(variant),
            fingerprint=variant.chain,
            residency=self._cluster.residency(served.chain),
            has_chat_template=self._has_chat_template(variant),
            approximation=self._intake.approximation(variant),
        )

    def _has_chat_template(self, variant: Variant) -> bool:
        files = variant.files
        if "chat_template.jinja" in files:
            return True
        config = files.get("tokenizer_config.json")
        if config is None:
            return False
        if config not in self._templates:
            self._templates[config] = _has_template(self._store, config)
        return self._templates[config]

    async def _tokenize(self, query: api.Tokenize) -> api.Tokenized:
        self._intake.tenant(query.api_key)
        variant = self._intake.find(query.model).variant
        tokens = await self._intake.encode(
            await self._intake.text(variant),
            query.prompt,
            query.messages,
            add_special_tokens=query.add_special_tokens,
        )
        return api.Tokenized(query.id, tokens, self._intake.context(variant))

    async def _detokenize(self, query: api.Detokenize) -> api.Detokenized:
        self._intake.tenant(query.api_key)
        variant = self._intake.find(query.model).variant
        check_ids("tokens", query.tokens, variant.vocabulary)
        text = await self._intake.text(variant)
        try:
            return api.Detokenized(query.id, text.decode(query.tokens, skip_special_tokens=False))
        except TextError as error:
            raise InvalidRequest(str(error), "model") from error


def _has_template(store: Store, digest: ObjectDigest) -> bool:
    try:
        return b'"chat_template"' in store.blob(digest)
    except ZooError:
        return False
