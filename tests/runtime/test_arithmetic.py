from pathlib import Path

import pytest

from quantool.runtime import arithmetic

MODERN = "flags\t\t: fpu sse2 avx2 avx512_bf16 avx512_fp16"


@pytest.mark.parametrize(
    ("cpu", "limit", "native"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_vnni", None, ()),
        ("flags\t\t: fpu avx512_bf16\nflags\t\t: fpu", None, ("bfloat16",)),
        (MODERN, None, ("bfloat16", "float16")),
        (MODERN, "AVX2", ()),
        (MODERN, "avx512_core", ()),
        (MODERN, "AVX512_CORE_BF16", ("bfloat16",)),
        (MODERN, "AVX512_CORE_AMX", ("bfloat16",)),
        (MODERN, "ALL", ("bfloat16", "float16")),
        ("Features\t: fp asimd asimdhp bf16", None, ("bfloat16", "float16")),
        ("model name\t: something else", None, ()),
    ],
)
def test_what_a_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, cpu: str, limit: str | None, native: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _path, **_more: cpu)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    arithmetic._flags.cache_clear()
    try:
        assert arithmetic.native() == native
    finally:
        arithmetic._flags.cache_clear()


@pytest.mark.parametrize(("native", "dtype"), [((), "float32"), (("bfloat16",), "bfloat16")])
def test_a_model_is_widened_where_its_type_is_not_native(
    monkeypatch: pytest.MonkeyPatch, native: tuple[str, ...], dtype: str
) -> None:
    import torch

    monkeypatch.setattr(arithmetic, "native", lambda: native)
    embedding, head = torch.nn.Embedding(4, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight  # tied
    model = torch.nn.Sequential(embedding, head)
    model.register_buffer("scale", torch.tensor([0.1], dtype=torch.bfloat16))
    model.register_buffer("packed", torch.tensor([1.5]).to(torch.float8_e4m3fn))
    before = embedding.weight.detach().clone()
    arithmetic.widen(model)
    kinds = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
    assert kinds == {
        "0.weight": f"torch.{dtype}",
        "1.weight": f"torch.{dtype}",
        "scale": f"torch.{dtype}",
        "packed": "torch.float8_e4m3fn",  # a number that means nothing without its scale
    }
    assert torch.equal(embedding.weight.to(torch.bfloat16), before)
    assert head.weight is embedding.weight
    assert model(torch.tensor([1])).dtype == embedding.weight.dtype
