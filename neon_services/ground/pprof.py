"""Profiles in pprof's format (``profile.proto`` of github.com/google/pprof), gzipped: what ``go tool pprof FILE`` opens.

A profile is a bag of samples: a stack, and numbers of the kinds that the profile declares. Strings, functions and places in
code are tables that samples refer to by number; string 0 is always "". The messages are described at run time.
"""

import gzip
import time
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "perftools.profiles"
# message -> fields as (number, name, type, repeated)
_MESSAGES: dict[str, list[tuple[int, str, str, bool]]] = {
    "ValueType": [(1, "type", "i64", False), (2, "unit", "i64", False)],
    "Sample": [(1, "location_id", "u64", True), (2, "value", "i64", True), (3, "label", "Label", True)],
    "Label": [(1, "key", "i64", False), (2, "str", "i64", False), (3, "num", "i64", False), (4, "num_unit", "i64", False)],
    "Mapping": [(1, "id", "u64", False), (5, "filename", "i64", False), (7, "has_functions", "bool", False),
                (8, "has_filenames", "bool", False), (9, "has_line_numbers", "bool", False)],
    "Location": [(1, "id", "u64", False), (2, "mapping_id", "u64", False), (3, "address", "u64", False),
                 (4, "line", "Line", True)],
    "Line": [(1, "function_id", "u64", False), (2, "line", "i64", False)],
    "Function": [(1, "id", "u64", False), (2, "name", "i64", False), (3, "system_name", "i64", False),
                 (4, "filename", "i64", False), (5, "start_line", "i64", False)],
    "Profile": [(1, "sample_type", "ValueType", True), (2, "sample", "Sample", True), (3, "mapping", "Mapping", True),
                (4, "location", "Location", True), (5, "function", "Function", True), (6, "string_table", "string", True),
                (9, "time_nanos", "i64", False), (10, "duration_nanos", "i64", False),
                (11, "period_type", "ValueType", False), (12, "period", "i64", False), (13, "comment", "i64", True),
                (14, "default_sample_type", "i64", False)],
}  # fmt: skip
_SCALARS = {"i64": "TYPE_INT64", "u64": "TYPE_UINT64", "bool": "TYPE_BOOL", "string": "TYPE_STRING"}


def _make_profile_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="neon_services/profile.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field_name, kind, repeated in fields:
            field = message.field.add(name=field_name, number=number, json_name=field_name)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in _SCALARS:
                field.type = getattr(field, _SCALARS[kind])
            else:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Profile"))


Profile = _make_profile_class()

#: One place in code: function's name, its file, the function's first line, the line.
Frame = tuple[str, str, int, int]


class ProfileBuilder:
    """Collects samples and writes the file. ``kinds`` are the numbers of each sample as (type, unit)."""

    def __init__(self, kinds: Sequence[tuple[str, str]], *, period: tuple[str, str, int], program: str) -> None:
        self._profile = Profile()
        self._strings: dict[str, int] = {}
        self._functions: dict[tuple[str, str, int], int] = {}
        self._locations: dict[Frame, int] = {}
        self._kinds = len(kinds)
        self._string("")
        for kind, unit in kinds:
            self._profile.sample_type.add(type=self._string(kind), unit=self._string(unit))
        self._profile.period_type.type, self._profile.period_type.unit = self._string(period[0]), self._string(period[1])
        self._profile.period = period[2]
        self._profile.mapping.add(
            id=1, filename=self._string(program), has_functions=True, has_filenames=True, has_line_numbers=True
        )
        self._profile.default_sample_type = self._string(kinds[-1][0])

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _location(self, frame: Frame) -> int:
        number = self._locations.get(frame)
        if number is None:
            name, filename, first_line, line = frame
            function = self._functions.setdefault((name, filename, first_line), len(self._functions) + 1)
            if function > len(self._profile.function):
                text = self._string(name)
                self._profile.function.add(
                    id=function, name=text, system_name=text, filename=self._string(filename), start_line=first_line
                )
            number = self._locations[frame] = len(self._locations) + 1
            self._profile.location.add(id=number, mapping_id=1).line.add(function_id=function, line=line)
        return number

    def add(self, stack: Iterable[Frame], values: Sequence[int], thread: str | None = None) -> None:
        """One sample; the innermost frame comes first."""
        assert len(values) == self._kinds
        sample = self._profile.sample.add(location_id=[self._location(frame) for frame in stack], value=values)
        if thread is not None:
            sample.label.add(key=self._string("thread"), str=self._string(thread))

    def finish(self, duration_ns: int) -> bytes:
        """The gzipped file."""
        self._profile.time_nanos = time.time_ns() - duration_ns
        self._profile.duration_nanos = duration_ns
        del self._profile.string_table[:]
        self._profile.string_table.extend(self._strings)
        return gzip.compress(self._profile.SerializeToString(), mtime=0)
