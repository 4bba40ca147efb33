"""Files that are damaged on purpose: from a good one many variants, by rule.

A variant is a pair: what was done, in words, and the damaged content. `of_tree` is for what JSON
holds, `of_checkpoint` for what `torch.save` holds, `of_bytes` and `of_json` for whole files. What
reads such a file must end in one sentence (`UserError`), or use nothing of what is wrong.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Variants = Iterator[tuple[str, T]]

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 243269632\n"
MOST_ITEMS = 2  # of a list of equals, how many are damaged
DEEP = 50


def nested(kind: type, depth: int = DEEP) -> Any:
    """A list in a list in a list …, or a block in a block …."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def replacements(value: Any) -> Variants[Any]:
    """What may stand in the place of a plain value: other types, other sizes, nothing."""
    others: dict[str, Any] = {
        "null": None,
        "true": True,
        "text": "some text",
        "empty text": "",
        "zero": 0,
        "negative": -1,
        "a fraction": 1.5,
        "a million": 10**6,
        "beyond 64 bits": 2**70,
        "NaN": math.nan,
        "infinite": math.inf,
        "an empty list": [],
        "an empty block": {},
        "a deep list": nested(list),
        "a deep block": nested(dict),
    }
    if isinstance(value, bool):
        others |= {"false": False}
    elif isinstance(value, int | float):
        others |= {
            "the number as text": str(value),
            "negated": -value,
            "the number in a list": [value],
        }
    elif isinstance(value, str):
        others |= {"long text": "x" * 100_000, "text with a zero byte": value + "\0"}
    elif isinstance(value, list):
        others |= {"as a block": dict(enumerate(map(str, value)))}
    for words, other in others.items():
        if type(other) is not type(value) or (other != value and other == other) or other != other:
            yield words, other


def of_tensor(tensor: torch.Tensor) -> Variants[Any]:
    """What may stand in the place of a tensor."""
    yield from replacements(None)
    yield "a list of its values", tensor.flatten()[:4].tolist()
    yield "a number", 0.5
    yield "empty", tensor.new_zeros(0)
    yield "one dimension more", tensor[None]
    if tensor.dim():
        yield "cut", tensor[: len(tensor) // 2]
    yield "boolean", tensor > 0
    yield "complex", tensor.to(torch.complex64)
    yield "sparse", tensor.to_sparse()
    yield "without values", tensor.to("meta")
    if not tensor.is_floating_point():
        yield "of fractions", tensor + 0.5
        return
    yield "whole numbers", tensor.long()
    if hasattr(torch, "quantize_per_tensor"):  # newer versions of torch lose it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield "quantised", torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    for words, number in (("NaN", math.nan), ("infinite", math.inf)):
        changed = tensor.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[-1:] = number
        yield f"with one value {words}", changed
    yield "too large for float32", tensor.double() * 1e300 + 1e300


def of_checkpoint(checkpoint: dict[str, Any]) -> Variants[Any]:
    """Damaged variants of what a checkpoint or a weight file holds; the rest of it is shared."""
    yield from of_tree(checkpoint, tensors=of_tensor)


def of_tree(
    tree: Any, *, tensors: Callable[[torch.Tensor], Variants[Any]] | None = None
) -> Variants[Any]:
    """Damaged variants of nested dicts and lists: every key deleted, renamed, replaced.

    Of a list the first and the last item stand for all, and of a dict from names to tensors or
    lists of numbers the first and the last entry.
    """

    def visit(value: Any, where: str, rebuild: Callable[[Any], Any]) -> Variants[Any]:
        if isinstance(value, torch.Tensor):
            assert tensors is not None
            others: Iterable[tuple[str, Any]] = tensors(value)
        else:
            others = replacements(value)
        for words, other in others:
            yield f"{where} is {words}", rebuild(other)
        if isinstance(value, dict):
            yield from blocks(value, where, rebuild)
        elif isinstance(value, list | tuple):
            yield from lists(list(value), where, rebuild)

    def blocks(block: dict[Any, Any], where: str, rebuild: Callable[[Any], Any]) -> Variants[Any]:
        keys = list(block)
        if len(keys) > MOST_ITEMS and len({_kind(value) for value in block.values()}) == 1:
            keys = [keys[0], keys[-1]]
        for key in keys:
            below = f"{where}.{key}" if where else str(key)
            rest = {name: value for name, value in block.items() if name != key}
            yield f"{below} is missing", rebuild(rest)
            yield f"{below} is called {key}x", rebuild(rest | {f"{key}x": block[key]})
            if tensors is not None:  # JSON has no other names
                yield f"{below} is called by a tuple", rebuild(rest | {(1, 2): block[key]})
            yield from visit(block[key], below, lambda v, key=key: rebuild({**block, key: v}))
        yield f"{where or 'the whole'} has a key more", rebuild({**block, "surplus": 1})

    def lists(items: list[Any], where: str, rebuild: Callable[[Any], Any]) -> Variants[Any]:
        if not items:
            return
        yield f"{where} lacks its last item", rebuild(items[:-1])
        yield f"{where} has its first item twice", rebuild([items[0], *items])
        yield f"{where} has 20,000 items", rebuild(items[:1] * 20_000)
        for at in sorted({0, len(items) - 1}):

            def put(value: Any, at: int = at) -> Any:
                return rebuild([*items[:at], value, *items[at + 1 :]])

            yield from visit(items[at], f"{where}[{at}]", put)

    yield from visit(tree, "", lambda value: value)


def _kind(value: Any) -> Any:
    """By what the entries of a dict count as alike."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, dict):
        return tuple(sorted(map(str, value)))
    return type(value) if isinstance(value, list) else object()


def of_bytes(content: bytes, seed: int = 0) -> Variants[bytes]:
    """Damaged variants of any file: cut, altered, another file in its place."""
    yield "empty", b""
    yield "a web page", HTML
    yield "a pointer to the file", POINTER
    yield "a sentence", b"Rate limit exceeded.\n"
    yield "text in 16 bits", "the file could not be found".encode("utf-16")
    yield "zero bytes", bytes(len(content[:1000]))
    yield "noise", random.Random(seed).randbytes(1000)
    yield "a pickled list", pickle.dumps([1, 2, 3])
    yield "the beginning of an archive", b"PK\x03\x04" + bytes(100)
    for share in (0.01, 0.3, 0.7, 0.99):
        yield f"cut at {share:.0%}", content[: int(share * len(content))]
    yield "without its last byte", content[:-1]
    yield "with a byte more", content + b"\x07"
    for share in (0.0, 0.2, 0.5, 0.8, 0.999):
        changed = bytearray(content)
        changed[int(share * len(content))] ^= 0x14
        yield f"one byte altered at {share:.1%}", bytes(changed)


def of_json(text: str) -> Variants[bytes]:
    """Damaged variants of a JSON file that holds one object: of its bytes, words and values."""
    tree = json.loads(text)
    body = text.strip().removeprefix("{")
    yield from of_bytes(text.encode())
    for words, changed in {
        "a key twice": json.dumps({"surplus": 1})[:-1] + "," + '"surplus": 2,' + body,
        "NaN as a value": '{"surplus": NaN,' + body,
        "-Infinity as a value": '{"surplus": -Infinity,' + body,
        "a number beyond floats": '{"surplus": 1e999,' + body,
        "a number of 5,000 digits": f'{{"surplus": {"9" * 5000},' + body,
        "lists nested 100,000 deep": '{"surplus": ' + "[" * 100_000 + "]" * 100_000 + "," + body,
        "blocks nested 500 deep": '{"surplus": ' + '{"a":' * 500 + "1" + "}" * 500 + "," + body,
        "100,000 keys": "{" + "".join(f'"k{n}": 1,' for n in range(100_000)) + body,
        "a key of 100,000 letters": '{"' + "k" * 100_000 + '": 1,' + body,
        "a comment": text + "\n// the end",
        "two objects": text + text,
        "a byte-order mark": "\ufeff" + text,
        "no quotes": text.replace('"', ""),
    }.items():
        yield words, changed.encode()
    for words, changed in of_tree(tree):
        yield words, json.dumps(changed).encode()


def some(variants: Variants[T], share: float, seed: int = 0) -> Variants[T]:
    """A random share of variants, the same on every call."""
    chosen = random.Random(seed)
    return ((words, value) for words, value in variants if chosen.random() < share)


def copied(variants: Variants[T]) -> Variants[T]:
    """Variants that share nothing with each other, for readers that change what they are given."""
    return ((words, copy.deepcopy(value)) for words, value in variants)


def together(**variants: Variants[T]) -> Variants[T]:
    """Variants of several kinds, each with the name of its kind before it."""
    return chain.from_iterable(
        ((f"{kind}: {words}", value) for words, value in each) for kind, each in variants.items()
    )
