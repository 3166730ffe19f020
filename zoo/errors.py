"""Everything that can go wrong with a zoo, as one flat family.

Each message is one sentence that says what is wrong and, where there is a choice, what to do. The
command line prints it as it is; engine and workers pass it on. Imports nothing of ours.
"""


class ZooError(Exception):
    """Base of the family; `except ZooError` catches every refusal of the zoo."""


class UnknownVariant(ZooError):
    """No variant of that name is in the catalog."""


class NameTaken(ZooError):
    """A variant of that name exists and replacing it was not asked for."""


class BadName(ZooError):
    """A variant's name or an object's digest does not have the form of one."""


class BadSource(ZooError):
    """The source is of no kind that can be added, or cannot be reached."""


class BadCheckpoint(ZooError):
    """A checkpoint is damaged, incomplete, or holds what its family does not know."""


class BadAdapter(ZooError):
    """An adapter is damaged, unsupported, without effect, or made for another base."""


class NotEqual(ZooError):
    """A new variant's chain does not compute what its source computes; nothing was published."""


class BadTensorFile(ZooError):
    """A safetensors file breaks the format."""


class UnsupportedFamily(ZooError):
    """The architecture, or a feature its config asks for, cannot be served."""


class UnsupportedOption(ZooError):
    """An option, or a combination of options, that this version does not offer."""


class Incomparable(ZooError):
    """Two variants that nothing can, or may, be measured between."""


class MissingObject(ZooError):
    """The store holds no object of that digest."""


class DamagedObject(ZooError):
    """An object's content is not what its digest says."""


class DamagedCatalog(ZooError):
    """The catalog cannot be read, or was written by a newer version."""


class BadDelivery(ZooError):
    """What another zoo sends is not what it is said to be; it was not taken."""


class StoreFailure(ZooError):
    """The file system refused to write; nothing was published."""


class DiskFull(StoreFailure):
    """No room is left for an object or the catalog; nothing was published."""


class ZooBusy(ZooError):
    """Another process kept changing the zoo for longer than this one was willing to wait."""
