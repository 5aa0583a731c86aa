"""Rows of CSV and JSON lines, read line by line so that every error can name its line, counted from 1 (a CSV header is line 1)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from distillation.errors import InputError

LINE_BYTES = 1 << 26
"""A longer line is not a row but a file of another kind."""


def csv_dicts(stream: BinaryIO, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv_rows(stream, path)
    header = next(rows, (1, []))[1]
    for number, row in rows:
        if len(row) != len(header):
            raise InputError(
                "DST-3409", "row cannot be parsed", where=f"{path}:line {number}", expected=f"{len(header)} fields", found=str(len(row))
            )
        yield number, dict(zip(header, row, strict=True))


def csv_rows(stream: BinaryIO, path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their last line."""
    csv.field_size_limit(1 << 24)
    reader = csv.reader(text_lines(stream, path), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(
            "DST-3409", "row cannot be parsed", where=f"{path}:line {reader.line_num}", expected="CSV", found=str(error)
        ) from error


def json_rows(stream: BinaryIO, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_lines(stream, path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                "DST-3409", "row cannot be parsed", where=f"{path}:line {number}", expected="a JSON object on one line",
                found=f"{error} in {line.strip()[:40]!r}", do="If it is the last line, the file was cut off",
            ) from error  # fmt: skip
        if not isinstance(row, dict):
            raise InputError(
                "DST-3409",
                "row cannot be parsed",
                where=f"{path}:line {number}",
                expected="a JSON object on one line",
                found=type(row).__name__,
            )
        yield number, row


def text_lines(stream: BinaryIO, path: str) -> Iterator[str]:
    offset = number = 0
    while line := stream.readline(LINE_BYTES):
        number += 1
        if len(line) == LINE_BYTES:
            raise InputError(
                "DST-3409", "line is too long", where=f"{path}:line {number}", expected=f"under {LINE_BYTES} bytes", found="more"
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(f"{path}:line {number}", error, offset) from None
        yield text.removeprefix("\ufeff") if number == 1 else text
        offset += len(line)


def not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> InputError:
    return InputError(
        "DST-3411", "text is not UTF-8", where=f"{where}, byte {offset + error.start}", expected="UTF-8",
        found=f"byte 0x{error.object[error.start]:02x}", do="Convert the file to UTF-8",
    )  # fmt: skip
