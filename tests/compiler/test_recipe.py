"""The little language of `--quant`."""

import itertools

import pytest

from dsopt.compiler.recipe import Format, Recipe
from dsopt.compiler.roles import GROUPS, ROLES
from dsopt.runtime.errors import UsageError

FORMATS = [
    "none",
    "w8a8",
    "w8a8-token",
    "w8a8-rot",
    "w7a8-token-rot",
    "int4",
    "int8",
    "int4-zp",
    "int8-zp",
    "int4-b16",
    "int8-b256",
    "int4-zp-b128",
]


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
        ("w8a8,head=w7a8-rot", "w7a8-rot"),
        ("int4,head=fp8", "none"),
        ("int4,embed=w8a8", "w8a8"),
        ("int4,embed=none", "none"),
        ("none,embed=int8-b16", "int8-b16"),
    ],
)
def test_the_embedding_goes_with_the_head_unless_said(text: str, embedding: str) -> None:
    assert str(Recipe.parse(text).embedding(64)) == embedding


@pytest.mark.parametrize(
    ("texts", "spelled"),
    [
        (["int4,head=int8,down=int8", "int4,down=int8,head=int8", " int4-b32, head=int8 ,down=int8-b32"], None),
        (["int4,attn=int8", "int4,q=int8,o=int8,k=int8,v=int8", "int4,o=int8,qkv=int8", "int4,q=none,attn=int8"], None),
        (
            ["int4,qkv=int8,o=none", "int4,attn=none,qkv=int8", "int4,o=none,v=int8,k=int8,q=int8"],
            None,
        ),
        (["int4", "int4,down=int4", "int4,mlp=int8,mlp=int4,embed=int4", "int4,cache=float"], None),
        (["w8a8", "w8a8,head=int8,embed=int8", "w8a8,down=w8a8"], None),
        (["w8a8,head=w8a8", "w8a8,embed=w8a8,head=w8a8"], None),
        (["w8a8,head=w8a8,embed=int8", "w8a8,embed=int8,head=w8a8"], None),
        (["int4-min", "int4-min,embed=int8"], None),
        (["int8,embed=none"], None),
        (["fp8,cache=fp8,dtype=bf16", "fp8,dtype=bf16,embed=none,cache=fp8"], None),
        (["auto", "int8"], "int8"),
    ],
)
def test_one_recipe_has_one_spelling(texts: list[str], spelled: str | None) -> None:
    recipes = [Recipe.parse(text) for text in texts]
    spelled = spelled or texts[0]
    for recipe in recipes:
        assert recipe.text == spelled
        again = Recipe.parse(spelled)
        assert {role: recipe.format(role) for role in ROLES} == {role: again.format(role) for role in ROLES}
        assert (recipe.embedding(64), recipe.cache, recipe.dtype) == (again.embedding(64), again.cache, again.dtype)


@pytest.mark.parametrize("base", ["int4", "w8a8", "int4-min", "none"])
def test_different_recipes_have_different_spellings(base: str) -> None:
    """Every format for every one or two roles: what is spelled alike is alike."""
    seen: dict[str, object] = {}
    parts = [f"{role}={form}" for role in (*ROLES, "embed", *GROUPS) for form in ("int4", "int8", "none", "w8a8")]
    for one, other in itertools.product(parts, parts):
        try:
            recipe = Recipe.parse(f"{base},{one},{other}")
        except UsageError:  # a table that no gather reads
            continue
        meant = {role: str(recipe.format(role)) for role in ROLES}, str(recipe.embedding(64))
        assert seen.setdefault(recipe.text, meant) == meant
    assert len(set(map(str, seen.values()))) == len(seen)


def test_a_float_type_that_is_the_targets_need_not_be_said() -> None:
    assert Recipe.parse("int4,dtype=fp32").said_dtype == "fp32"
    assert Recipe.parse("int4,dtype=fp32").with_dtype("fp32").text == "int4"
    assert Recipe.parse("int4,dtype=fp16,head=int8").with_dtype("fp16").text == "int4,head=int8,dtype=fp16"
    assert Recipe.parse("int4,head=int8").with_dtype("fp16").text == "int4,head=int8,dtype=fp16"


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
        "int4,embed=int4-min",
        "int4,head=w8a8-token",
        "int4,embed=w8a8-token",
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
