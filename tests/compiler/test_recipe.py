"""The little language of `--quant`."""

import pytest

from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.roles import ROLES
from dsopt.runtime.errors import UsageError

FORMATS = ["none", "w8a8", "w8a8-token", "int4", "int8", "int4-zp", "int8-zp", "int4-b16", "int8-b256", "int4-zp-b128"]


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_reads_back_what_it_writes(text: str) -> None:
    assert str(Format.parse(text)) == text


def test_the_usual_block_size_need_not_be_said() -> None:
    assert Format.parse("int4-b32") == Format.parse("int4") == Format("nbits", 4, 32)


def test_the_default_is_for_the_roles_that_are_not_named() -> None:
    recipe = Recipe.parse("int4, attn=int8 ,v=none,head=w8a8")
    assert {role: str(recipe.format(role)) for role in ROLES} == {
        "q": "int8",
        "k": "int8",
        "v": "none",
        "o": "int8",
        "gate": "int4",
        "up": "int4",
        "down": "int4",
        "head": "w8a8",
    }


@pytest.mark.parametrize(
    ("text", "embedding"),
    [
        ("int4", "int4"),
        ("none", "none"),
        ("int4,head=int8-zp", "int8-zp"),
        ("w8a8", "int8"),
        ("w8a8,head=int4", "int4"),
        ("int4,embed=none", "none"),
        ("none,embed=int8-b16", "int8-b16"),
    ],
)
def test_the_embedding_goes_with_the_head_unless_said(text: str, embedding: str) -> None:
    assert str(Recipe.parse(text).embedding(64)) == embedding


def test_auto_is_a_recipe() -> None:
    assert Recipe.parse("auto").default.kernel != "none"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int3",
        "int4-b33",
        "int4-b32-zp",
        "INT4",
        "none-zp",
        "w8a8-b32",
        "int4,",
        "int4,head",
        "int4,head=",
        "int4,=int8",
        "int4,nose=int8",
        "int4,head=int8=int4",
        "int4 int8",
        "embed=int8",
        "int4,embed=w8a8",
    ],
)
def test_what_is_no_recipe_is_a_wrong_call_said_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="--quant") as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "n", "k", "size"),
    [
        ("none", 3, 5, 60),
        ("w8a8", 3, 5, 3 * 5 + 3 * 4),
        ("int4", 2, 64, 2 * (2 * 16 + 2 * 4)),
        ("int4", 2, 65, 2 * (3 * 16 + 3 * 4)),  # the last block is stored whole
        ("int4-zp", 2, 96, 2 * (3 * 16 + 3 * 4 + 2)),  # three zero points in two bytes
        ("int8-zp-b16", 1, 32, 32 + 2 * 4 + 2),
    ],
)
def test_the_size_of_a_weight(text: str, n: int, k: int, size: int) -> None:
    assert Format.parse(text).nbytes(n, k) == size
