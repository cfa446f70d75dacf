"""The functions around wgmma in CUDA C++, whose operands have to be written out."""

from __future__ import annotations


def multiply(
    name: str, columns: int, dtype: str, *, registers: bool = False, transposed: bool = False
) -> str:
    """A device function `name(d, a, b, add)`: d [64, columns] ← a·b, or + a·b, along 16.

    `a` is a descriptor of shared memory, or four registers; `b` a descriptor, whose columns run
    fastest if `transposed`.
    """
    n = columns // 2
    place = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    if registers:
        left, kind = "{" + ", ".join(f"%{n + i}" for i in range(4)) + "}", "const u32 *a"
        given, after, flags = ", ".join(f'"r"(a[{i}])' for i in range(4)), n + 4, "1, 1"
    else:
        left, kind, given, after, flags = f"%{n}", "u64 a", '"l"(a)', n + 1, "1, 1, 0"
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{n}], {kind}, u64 b, int add) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{after + 1}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} "
        f'{{{place}}}, {left}, %{after}, p, {flags}, {int(transposed)}; }}"'
        f' : {operands} : {given}, "l"(b), "r"(add));\n}}'
    )
