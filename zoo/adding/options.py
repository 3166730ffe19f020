"""How to add a variant: the options of `zoo add`."""

from dataclasses import dataclass
from pathlib import Path

from zoo.errors import UnsupportedOption

DEFAULT_AGREEMENT = 0.99
DEFAULT_DELTA_BUDGET = 1 / 14


@dataclass(frozen=True, slots=True)
class AddOptions:
    """How to add: `dtype` is what a `.gguf` is stored as, `wait_s` how long the lock may take.

    `delta_budget` is the share of a fine-tune's bytes that `delta` may keep, and `text` has rows
    like those that it will read, for which it is made best. `min_agreement` and
    `budget` (nats of mean divergence) bound what `equivalent` may change. Both ways are measured on
    `rows` held-out rows of `data`, or of the built-in text, and on a `task` if one is named. What
    is `private` is never compared with what is another `tenant`'s."""

    base: str | None = None
    store: str = "exact"
    min_agreement: float | None = None
    replace: bool = False
    dtype: str = "float32"
    wait_s: float = 600.0
    golden: bool = True
    delta_budget: float = DEFAULT_DELTA_BUDGET
    budget: float | None = None
    data: Path | None = None
    rows: int = 64
    task: str | None = None
    text: Path | None = None
    private: bool = False
    tenant: str = ""

    @property
    def agreement_bound(self) -> float:
        """The share of best tokens that `equivalent` has to leave as they are."""
        return DEFAULT_AGREEMENT if self.min_agreement is None else self.min_agreement


def check_options(options: AddOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if options.store not in {"exact", "delta", "equivalent"}:
        raise UnsupportedOption(
            f"--store {options.store!r} is unknown: it is exact, delta or equivalent"
        )
    for flag, value in (("--min-agreement", options.min_agreement), ("--budget", options.budget)):
        if value is not None and options.store != "equivalent":
            raise UnsupportedOption(f"{flag} is only valid with --store equivalent")
    if options.text is not None and options.store != "delta":
        raise UnsupportedOption("--text is only valid with --store delta")
    if not 0 <= options.agreement_bound <= 1:
        raise UnsupportedOption("--min-agreement is a share: give a number from 0 to 1")
    if options.budget is not None and not options.budget >= 0:
        raise UnsupportedOption("--budget is a divergence in nats: give a number from 0")
    if not 0 < options.delta_budget <= 1:
        raise UnsupportedOption("--delta-budget is a share of the bytes: give a number up to 1")
