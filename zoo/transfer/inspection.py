"""Looking through a shipment before anything of it is fetched: everything it says is checked, and
that it says all that is needed and no more."""

from pathlib import PurePath

from zoo.errors import BadDelivery, BadTensorFile, ZooError
from zoo.manifest import EmbedSpec, HeadSpec, ObjectDigest, StitchSpec, Variant, digest, objects_of
from zoo.names import checked_name
from zoo.sources.tensorfile import tensor_bytes
from zoo.store import ObjectInfo, checked_digest
from zoo.transfer.shapes import check_shapes
from zoo.transfer.shipment import Shipment

MAX_UNITS = 4096
MAX_OBJECT_BYTES = 1 << 40
_COUNTS = ("shared", "changed", "attached")


def inspect(shipment: Shipment, name: str) -> None:
    """Raises BadDelivery for the first thing in which a shipment is not sound; `name` is what was
    asked for."""
    try:
        _check_digests(shipment)
        _check_variant(shipment.publication.variant, name)
        _check_objects(shipment)
        _check_ends(shipment)
        check_shapes(shipment.publication)
    except BadDelivery:
        raise
    except (ZooError, RecursionError) as error:
        raise BadDelivery(f"{name!r} cannot be taken: {error}") from error


def _check_digests(shipment: Shipment) -> None:
    """Every manifest has its name, all that are named are there, and no others."""
    publication = shipment.publication
    chain = publication.chain
    if not 2 <= len(chain.units) == len(chain.attachments) <= MAX_UNITS:
        raise BadDelivery(f"its chain has {len(chain.units)} units, which cannot be")
    named = {d for d in chain.attachments if d is not None}
    if set(chain.units) != publication.units.keys() or named != publication.attachments.keys():
        raise BadDelivery("its manifests are not those that its chain names")
    manifests = {publication.variant.chain: chain, **publication.units, **publication.attachments}
    for known, manifest in manifests.items():
        if digest(manifest) != known:
            raise BadDelivery(f"the manifest {checked_digest(known)} is not what its digest says")


def _check_variant(variant: Variant, name: str) -> None:
    if checked_name(variant.name) != name.partition("@")[0]:
        raise BadDelivery(f"{name!r} was asked for and {variant.name!r} came")
    if variant.base is not None:
        checked_name(variant.base.partition("@")[0])
    checked_name(variant.family)
    for file in variant.files:
        if PurePath(file).name != file or file in {"", ".", ".."} or "\0" in file or "\\" in file:
            raise BadDelivery(f"it has a file {file!r}, which is no plain file name")
    if not set(variant.borrowed) <= variant.files.keys():
        raise BadDelivery("it has borrowed files that it does not have")
    if set(variant.report) < set(_COUNTS):
        raise BadDelivery(f"its report does not say {', '.join(_COUNTS)}")
    positive = (variant.hidden, variant.vocabulary, variant.context)
    if min(positive) < 1 or max(positive) > 1 << 31:
        raise BadDelivery(f"width, vocabulary and context of {positive} cannot be")
    if not all(0 <= token < variant.vocabulary for token in variant.eos):
        raise BadDelivery("it ends at a token that its vocabulary does not have")


def _check_objects(shipment: Shipment) -> None:
    publication = shipment.publication
    variant = publication.variant
    files = set(variant.files.values())
    tensors = set(variant.tensors.values())
    for unit in publication.units.values():
        tensors.update(unit.tensors.values())
    for attachment in publication.attachments.values():
        tensors.update(objects_of(attachment))
    if files | tensors != publication.objects.keys():
        raise BadDelivery("its objects are not those that its manifests name")
    for object_digest, info in publication.objects.items():
        _check_object(object_digest, info, is_blob=object_digest in files)
    if files & tensors:
        raise BadDelivery("one object of it is both a file and a tensor")
    for child, parent in shipment.parents.items():
        is_twisted = parent in shipment.parents or checked_digest(parent) in files
        if child not in tensors or is_twisted:
            raise BadDelivery(f"object {child} cannot be a difference to {parent}")
        theirs = publication.objects.get(parent)
        if theirs is not None and theirs != publication.objects[child]:
            raise BadDelivery(f"object {child} cannot be a difference to {parent}")


def _check_object(object_digest: ObjectDigest, info: ObjectInfo, *, is_blob: bool) -> None:
    checked_digest(object_digest)
    if is_blob != (info.dtype == "BLOB"):
        raise BadDelivery(f"object {object_digest} is said to be a {info.dtype}")
    expected = info.shape[0] if is_blob and len(info.shape) == 1 else None
    try:
        size = expected if is_blob else tensor_bytes(info.dtype, info.shape)
    except BadTensorFile as error:
        raise BadDelivery(f"of object {object_digest} {error}") from error
    if size != info.nbytes or not 0 <= info.nbytes <= MAX_OBJECT_BYTES:
        raise BadDelivery(f"object {object_digest} is said to have {info.nbytes} bytes")


def _check_ends(shipment: Shipment) -> None:
    publication = shipment.publication
    specs = [publication.units[unit].spec for unit in publication.chain.units]
    first, *inner, last = specs
    if not isinstance(first, EmbedSpec) or not isinstance(last, HeadSpec):
        raise BadDelivery("its chain does not go from an embedding to a head")
    if any(isinstance(spec, EmbedSpec | HeadSpec) for spec in inner):
        raise BadDelivery("its chain has an embedding or a head in the middle")
    variant = publication.variant
    widths = {first.hidden, last.hidden}
    if variant.hidden not in widths or variant.vocabulary != last.vocabulary:
        raise BadDelivery("its record and its units differ in width or vocabulary")
    if len(widths) > 1 and not any(isinstance(spec, StitchSpec) for spec in inner):
        raise BadDelivery("its embedding and its head differ in width")
