"""Requests that may be large: their handlers read them part by part, so that others have their turn in between.

Each part is a request of the same type, with some of the messages of its one list. On the wire a message in a message
is bytes, so a request is taken apart without reading what is in it: half a million items may be in a megabyte.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

T = TypeVar("T", bound=Callable[..., Any])


def in_parts(request: type[Message]) -> Callable[[T], T]:
    """A handler whose requests come as `Parts`; their type has one field, which is a list of messages."""
    (field,) = request.DESCRIPTOR.fields
    assert field.is_repeated and field.message_type is not None
    unopened = _unopened(field.name, field.number)

    def mark(handler: T) -> T:
        handler.unopened = unopened  # type: ignore[attr-defined]
        return handler

    return mark


class Parts:
    """A request in which nobody has looked yet."""

    def __init__(self, unopened: Any, open_part: Callable[[bytes], Any]) -> None:
        (field,) = unopened.DESCRIPTOR.fields
        self._type, self._name, self._open_part = type(unopened), field.name, open_part
        self._messages: Sequence[bytes] = getattr(unopened, field.name)
        self.sizes = [len(each) for each in self._messages]  # bytes

    def __len__(self) -> int:
        """How many messages it has in all."""
        return len(self._messages)

    def open(self, first: int, last: int) -> Any:
        """The request with the messages from `first` to before `last`, once the gate has looked at all that they say.

        Raises:
            MalformedMessage, AccessRefused
        """
        return self._open_part(self._type(**{self._name: self._messages[first:last]}).SerializeToString())


def _unopened(name: str, number: int) -> type[Message]:
    """The type with the same list, but of bytes."""
    file = descriptor_pb2.FileDescriptorProto(name="unopened.proto", syntax="proto3")
    field = file.message_type.add(name="Unopened").field.add(name=name, number=number)
    field.type, field.label = field.TYPE_BYTES, field.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Unopened"))
