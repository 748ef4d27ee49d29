"""Text of strangers: limits of the JSON and TOML readers, and control characters in whatever is printed."""

from __future__ import annotations

import io
import json
import sys
import threading
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hydit_core.errors import ConfigError, DataError, HyditError, PrintableOutput, cli_main, printable
from hydit_core.pictures.png import read_parameters
from hydit_core.untrusted import parse_json, parse_toml, read_json, read_toml

BAD_JSON = {
    "syntax": ('{"a": 1,,}', "x is not valid JSON: "),
    "empty": ("", "x is not valid JSON: "),
    "cut string": ('{"a": "b\\', "x is not valid JSON: "),
    "a list": ("[1]", "x holds a list; expected an object"),
    "a number": ("3", "x holds a number; expected an object"),
    "null": ("null", "x holds null; expected an object"),
    "brackets": ('{"a":' + "[" * 100_000, "x: nested 100,001 deep; up to 100 levels are read"),
    "closed brackets": ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "x: nested 5,001 deep"),
    "objects": ('{"a":' * 5000 + "1" + "}" * 5000, "x: nested 5,000 deep"),
    "behind a string": ('{"[]}\\"}": ' + "[" * 200 + "]" * 200 + "}", "x: nested 201 deep"),
    "digits": ('{"a": ' + "9" * 100_000 + "}", r"x: the number 9{40}\.\.\. has 100,000 digits"),
    "negative": ('{"a": -' + "1" * 41 + "}", "has 42 digits"),
    "infinite": ('{"a": 1e999}', "x: the number 1e999 is too large"),
    "long fraction": ('{"a": 0.' + "1" * 5000 + "}", r"x: the number 0\.1{38}\.\.\. is too large"),
    "Infinity": ('{"a": Infinity}', "x: Infinity is not a number in JSON"),
    "NaN": ('{"a": [NaN]}', "x: NaN is not a number in JSON"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "x: the key 'b' occurs twice in one object"),
    "half a pair": ('{"a": "\\ud800"}', "x: half of a surrogate pair"),
    "half a pair as a key": ('{"\\uDFFF": 1}', "x: half of a surrogate pair"),
    "many values": ("[" + "0," * 1_000_001 + "0]", "x: about 1,000,003 values"),
}


@pytest.mark.parametrize("text, message", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_refused(text, message):
    with pytest.raises(DataError, match=message) as error:
        parse_json(text, "x", error=DataError)
    assert len(str(error.value)) < 300


def test_json_that_is_read():
    value = {"a": [1, -(2**63), 2**64 - 1, 10**30, 1e300, True, None, '[[[{{\\"', "\U0001f34e"], "": {}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        assert parse_json(text, "x") == value
        assert parse_json(text.encode(), "x") == value
    # Brackets in strings are no nesting, and 100 levels are not too many.
    deep = '{"a": "' + "[" * 1000 + '", "b": ' + "[" * 99 + "]" * 99 + "}"
    assert parse_json(deep, "x")["a"] == "[" * 1000
    assert parse_json("[1]", "x", kind=list) == [1]
    assert parse_json('"text"', "x", kind=object) == "text"


@pytest.mark.parametrize("start, repeated", [('{"a": "', '\\"'), ("", '"'), ("[" * 1000, '\\"')])
def test_the_look_at_brackets_is_linear(start, repeated):
    text = start + repeated * 500_000
    began = time.monotonic()
    with pytest.raises(HyditError):
        parse_json(text + "[" * 200, "x")
    assert time.monotonic() - began < 5  # a quadratic search takes minutes


def test_json_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes('{"a": "苹果"}'.encode("gb18030"))
    with pytest.raises(DataError, match=r"a\.json is not UTF-8 .*GB18030"):
        read_json(path, error=DataError)
    path.write_bytes('{"a": "b"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.json is not UTF-8 .*it is UTF-16"):
        read_json(path, error=DataError)
    path.write_bytes(b'{"a": 1}' + b" " * 100)
    with pytest.raises(DataError, match=r"a\.json is larger than 100 bytes"):
        read_json(path, error=DataError, max_bytes=100)
    for name in ("absent.json", "a\0b.json", "x" * 300, ""):
        with pytest.raises(DataError, match="cannot read"):
            read_json(tmp_path / name, error=DataError)


BAD_TOML = {
    "syntax": ("a = ", "x: not valid TOML"),
    "brackets": ("a = " + "[" * 100_000, "x: nested too deep"),
    "tables": ("a = " + "{b = " * 3000 + "1" + "}" * 3000, "x: nested too deep"),
    "closed brackets": ("a = " + "[" * 150 + "]" * 150, "x: nested too deep"),
    "dots": (".".join("a" * 50_000) + " = 1", "x: a key of more than 100 parts"),
    "quoted dots": (".".join(["'a'"] * 50_000) + " = 1", "x: a key of more than 100 parts"),
    "dots of a table": ("[" + ".".join("a" * 50_000) + "]", "x: a key of more than 100 parts"),
    "digits": ("a = " + "9" * 100_000, "x: "),
    "beyond 64 bits": ("a = [{b = 99999999999999999999}]", "x: a number does not fit into 64 bits"),
    "inf": ("a = -inf", "x: -inf is not a number that a setting can have"),
    "nan": ("[a]\nb = [nan]", "x: nan is not a number"),
    "too large": ("a = 1e999", "x: inf is not a number"),
}


@pytest.mark.parametrize("text, message", BAD_TOML.values(), ids=BAD_TOML)
def test_toml_that_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_toml(text, "x")
    assert len(str(error.value)) < 300


def test_toml_files(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfa = [1, 0.5, true]\n[b.c]\nd = 'x. y.'\n")
    assert read_toml(path) == {"a": [1, 0.5, True], "b": {"c": {"d": "x. y."}}}
    path.write_bytes(b"a = '" + b"x" * (256 << 10) + b"'")
    with pytest.raises(ConfigError, match=r"a\.toml is larger than 262,144 bytes"):
        read_toml(path)


def test_deep_json_in_a_thread_with_a_small_stack():
    """Where ComfyUI reads files; Python's own reader overflows it on some systems."""
    errors = []

    def read():
        with pytest.raises(HyditError, match="nested"):
            parse_json("[" * 1_000_000, "x")
        errors.append("refused")

    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert errors == ["refused"]


def test_printable_text():
    assert printable("red \x1b[31m\x07 \x9b2J\r\n\x7f") == r"red \x1b[31m\x07 \x9b2J\r\n\x7f"
    assert printable("a\u202eb\u2028c\u200bd\ud800") == r"a\u202eb\u2028c\u200bd\ud800"
    assert printable("a\U000e0041") == r"a\U000e0041"  # tags, which nobody sees
    for plain in ("红苹果 a\u3000b\u00a0c", "👩\u200d🚀 C:\\temp é", ""):
        assert printable(plain) == plain
    assert printable(printable("\x1b")) == r"\x1b"


def test_errors_are_lines_of_printable_text():
    assert str(WeightsLike("x\x1b]0;title\x07: bad\nerror: none")) == r"x\x1b]0;title\x07: bad\nerror: none"
    assert str(ConfigError("a.toml:", "  b\r", "  c")) == "a.toml:\n  b\\r\n  c"


class WeightsLike(HyditError):
    pass


def test_command_lines_print_no_control_characters(capsys):
    def run():
        print("a\x1b[2J", "b\nc\td")
        print("note \x9b\u202e\r", file=sys.stderr)
        raise HyditError("file \x1b[31m")

    before = sys.stdout, sys.stderr
    assert cli_main(run) == 2
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2J b\nc\td\n"
    assert err == "note \\x9b\\u202e\r\nerror: file \\x1b[31m\n"


def test_printable_output_is_a_stream():
    stream = io.StringIO()
    output = PrintableOutput(stream)
    print("x\x00", end="", file=output, flush=True)
    assert stream.getvalue() == "x\\x00" and not output.isatty()


PICTURES = {
    "not JSON": ("{", "chunk 'hydit' is not valid JSON"),
    "a list": ("[]", "chunk 'hydit' holds a list; expected an object"),
    "deep": ("[" * 100_000, "chunk 'hydit': nested 100,000 deep"),
    "a bomb of text": ("x" * (8 << 20), "not a readable picture"),
}


@pytest.mark.parametrize("text, message", PICTURES.values(), ids=PICTURES)
def test_pictures_that_say_strange_things(tmp_path, text, message):
    info = PngInfo()
    info.add_itxt("hydit", text, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError, match=message) as error:
        read_parameters(tmp_path / "a.png")
    assert str(error.value).startswith(str(tmp_path / "a.png"))


def test_the_pixels_of_a_picture_are_not_read_for_what_it_says(tmp_path):
    info = PngInfo()
    info.add_itxt("hydit", '{"steps": 3}')
    Image.new("1", (30_000, 5_000)).save(tmp_path / "big.png", pnginfo=info)
    content = (tmp_path / "big.png").read_bytes()
    (tmp_path / "big.png").write_bytes(content[: content.index(b"IDAT") + 8])
    assert read_parameters(tmp_path / "big.png") == {"steps": 3}
    Image.new("1", (30_000, 5_000)).save(tmp_path / "bare.png")
    with pytest.raises(DataError, match="carries no `hydit` chunk"):
        read_parameters(tmp_path / "bare.png")
