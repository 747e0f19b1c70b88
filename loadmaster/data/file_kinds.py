"""What a data file is where its name says something else, and what to make of files that are not read."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

LINE_OF_TEXT = 'one JSON object {"text": ...} a line (or a document), as .jsonl'
UNPACK = "unpack it first (gunzip, unzip, unzstd)"
SHEET = "save the sheet as .csv (in a spreadsheet program: CSV UTF-8)"
INSTEAD = {
    ".txt": LINE_OF_TEXT, ".md": LINE_OF_TEXT,
    ".gz": UNPACK, ".zip": UNPACK, ".zst": UNPACK, ".bz2": UNPACK, ".xz": UNPACK,
    ".xlsx": SHEET, ".xls": SHEET, ".ods": SHEET,
    ".tsv": "name it .csv, where tabs are read too",
    ".arrow": "write it as .parquet", ".feather": "write it as .parquet",
}
"""What to make of files that are not read, by suffix."""
ROW_FIELDS = {
    "messages", "conversations", "instruction", "output", "prompt", "completion", "response", "question", "answer",
    "text", "chosen", "rejected",
}
HEAD = 4096
"""Bytes of a file that say what it is."""
UTF16 = "save the file as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"
AGAIN = "the file is damaged or was cut off: write it again, or fetch it again"
FETCH = "fetch the file itself (on the Hub: /resolve/ in its address, not /blob/)"
BEGINNINGS = {
    b"\x1f\x8b": ("is packed by gzip", UNPACK),
    b"BZh": ("is packed by bzip2", UNPACK),
    b"\xfd7zXZ\0": ("is packed by xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("is packed by zstd", UNPACK),
    b"PK\x03\x04": ("is a zip archive, or a sheet such as .xlsx", f"unpack it first (unzip); {SHEET}"),
    b"ARROW1": ("is an Arrow file", "write it as .parquet"),
    b"%PDF": ("is a PDF", LINE_OF_TEXT),
    b"version https://git-lfs": ("is a pointer of Git LFS, not the file itself", "git lfs pull, then start again"),
    b"<!DOCTYPE": ("is a web page", FETCH),
    b"<!doctype": ("is a web page", FETCH),
    b"<html": ("is a web page", FETCH),
    codecs.BOM_UTF32_LE: ("is not UTF-8 text: it begins as UTF-32 does", UTF16.replace("16", "32")),  # before UTF-16's
    codecs.BOM_UTF16_LE: ("is not UTF-8 text: it begins as UTF-16 does", UTF16),
    codecs.BOM_UTF16_BE: ("is not UTF-8 text: it begins as UTF-16 does", UTF16),
    codecs.BOM_UTF32_BE: ("is not UTF-8 text: it begins as UTF-32 does", UTF16.replace("16", "32")),
}
PARQUET = b"PAR1"
LINES, ARRAY = 'name it .jsonl, as a file of lines {"...": ...} is named', "name it .json, from which lists are read"


def misnamed(path: Path, suffix: str) -> tuple[str, str] | None:
    """What a file is that cannot be read under its suffix, and the remedy; None for what can, or is not known."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if found := next((said for begins, said in BEGINNINGS.items() if head.startswith(begins)), None):
        return found
    if suffix != ".parquet":
        if head.startswith(PARQUET):
            return "is a Parquet file", "name it .parquet"
        if b"\0" in head[:4]:
            return _wide(head[:4])
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip()
    first = text.partition("\n")[0].strip()
    begins = "".join(text[:40].split())  # a line may break after each bracket
    if suffix != ".csv" and _is_header(first):
        return f"is CSV: its first line is {first[:60]!r}", "name it .csv"
    if suffix in (".csv", ".parquet"):
        remedy = LINES if begins.startswith('{"') else ARRAY if begins.startswith('[{"') else None
        return ("is JSON", remedy) if remedy else None
    if suffix != ".json" and first == "{":
        return "holds JSON objects over several lines each, not one a line", "write each on a line: jq -c . OLD > NEW"
    if suffix != ".json" and first in ("[", "[{"):
        return "is a JSON list over several lines, not an object a line", ARRAY
    return None


def _wide(head: bytes) -> tuple[str, str]:
    """Of text without its mark, whose first character is one of ASCII: the zeros beside it say which kind it is."""
    zeros = tuple(index for index, byte in enumerate(head) if not byte)
    kinds = {(1, 3): "16LE", (0, 2): "16BE", (1, 2, 3): "32LE", (0, 1, 2): "32BE", (1,): "16LE", (0,): "16BE"}
    if not (kind := kinds.get(zeros)):
        return "is not text: it begins with zeros", AGAIN
    return f"is not UTF-8 text: it begins as UTF-{kind[:2]} without its mark does", UTF16.replace("16 ", f"{kind} ")


def _is_header(line: str) -> bool:
    """Whether a line names columns of a CSV file, one at least as rows are named."""
    names = {name.strip(' "\r') for name in re.split("[,;\t]", line)}
    return len(names) > 1 and not line.startswith(("{", "[")) and bool(ROW_FIELDS & names)
