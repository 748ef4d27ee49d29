"""Whether Arrow can read a table from end to end; run as a script, in a process of its own.

Arrow's C++ believes what a file says of itself, and a damaged one can end the process that reads it. So a
file is read here first: what ends, hangs or fills the memory is this process. Nothing of hydit is imported,
for the sake of a quick start.

In: one JSON object, ``{"path": sys.path, "files": [...], "seconds": ...}``, of the processor at most. Out: a
line for each file, in JSON: null, or what is wrong with it.
"""

import json
import os
import sys

_DECODED = 1 << 30
"""Bytes of a Parquet file's columns that are decoded for the check: pictures beyond that are not."""
_MEMORY = 6 << 30


def check(path: str) -> None:
    """Raise whatever Arrow raises for a damaged file."""
    import pyarrow

    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        _check_parquet(path)
        return
    with pyarrow.memory_map(path) as mapped:
        try:
            table = pyarrow.ipc.open_file(mapped).read_all()
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            table = pyarrow.ipc.open_stream(mapped).read_all()
        table.validate(full=True)


def _check_parquet(path: str) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        large = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)) > _DECODED
        types = pyarrow.types
        columns = [
            field.name
            for field in file.schema_arrow
            if not (large and (types.is_struct(field.type) or types.is_binary(field.type)))
        ]
        for number in range(file.num_row_groups):
            file.read_row_group(number, columns=columns, use_threads=False).validate(full=True)


def _limit_memory(files: list[str]) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _limit(resource.RLIMIT_AS, _MEMORY + 2 * max(map(os.path.getsize, files), default=0))


def _limit_seconds(wanted: int) -> None:
    """Of the processor: by the clock, a check takes longer where other programs have that."""
    try:
        import resource
    except ImportError:
        return
    _limit(resource.RLIMIT_CPU, wanted)


def _limit(what: int, wanted: int) -> None:
    import resource

    soft, hard = resource.getrlimit(what)
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(what, (wanted, hard))


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    _limit_memory(request["files"])
    _limit_seconds(request["seconds"])
    import pyarrow.ipc  # noqa: F401

    for path in request["files"]:
        problem = None
        try:
            check(path)
        except Exception as error:
            problem = str(error) or type(error).__name__
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
