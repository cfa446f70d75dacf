"""Correctness and time of the Hopper products, each variant guarded."""

import json, os, subprocess, sys, time

out_dir = os.environ.get("JOBOUT", "/tmp")
V = []


def add(kind, rows, k, *cuts):
    for c in cuts:
        V.append((kind, rows, k, c))


add("write", 4608, 1024, (288, 2, 2, 1, 4), (288, 2, 2, 2, 4))
add("write", 4608, 3072, (288, 2, 2, 1, 4), (288, 2, 2, 2, 4))
add("qkv", 4608, 1024, (288, 2, 2, 1, 4), (288, 2, 2, 2, 4))
add(
    "swiglu",
    4608,
    1024,
    (288, 2, 2, 1, 4),
    (288, 2, 2, 2, 4),
    (192, 1, 3, 1, 4),
    (192, 1, 3, 2, 4),
    (288, 2, 2, 4, 4),
)
add("plain", 4608, 3072, (288, 2, 2, 2, 4))
add("qkv", 576, 1024, (144, 1, 2, 1, 5), (144, 1, 2, 2, 6), (144, 1, 2, 4, 6))
add("swiglu", 576, 1024, (144, 1, 3, 1, 4), (144, 1, 3, 2, 4), (144, 1, 3, 2, 5), (288, 2, 2, 2, 4))
add("write", 576, 1024, (288, 2, 2, 2, 4))


def worker(first):
    import torch
    from torch.nn import functional

    sys.path.insert(0, os.getcwd())
    from mvsplit.kernels import Gains, qk_norm_rope, split_merge, swiglu, forced_backend, Segments
    from mvsplit.kernels.hopper import product
    from mvsplit.kernels.fused.stream import Stream
    from mvsplit.sampling.engine_tune import graph_time

    torch.manual_seed(0)
    dev = "cuda"
    rel = lambda a, b: ((a.float() - b.float()).norm() / b.float().norm()).item()
    L = 12
    from concurrent.futures import ThreadPoolExecutor

    kid = {"plain": 0, "qkv": 1, "swiglu": 2, "write": 3}
    from mvsplit.kernels.choices import cache_folder

    t0 = time.time()
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda v: product.compiled(
                    product.source(
                        product.Cut(*v[3]),
                        kid[v[0]],
                        v[2],
                        256 if v[0] == "write" else 0,
                        torch.bfloat16,
                    ),
                    cache_folder() / "cuda",
                ),
                V[first:],
            )
        )
    print("compiled", round(time.time() - t0, 1), flush=True)
    for i in range(first, len(V)):
        kind, rows, k, c = V[i]
        print("START", i, flush=True)
        cut = product.Cut(*c)
        B = rows // 288
        s = Stream(B, 256, 32)
        n = {"plain": 1024, "write": 1024, "qkv": 3072, "swiglu": 6144}[kind]
        a = torch.randn(rows, k, device=dev).bfloat16()
        ws = [(torch.randn(n, k, device=dev) / k**0.5).bfloat16() for _ in range(L)]
        x = torch.randn(rows, 1024, device=dev).bfloat16()
        y = torch.full(
            (rows, n if kind != "swiglu" else n // 2),
            float("nan"),
            device=dev,
            dtype=torch.bfloat16,
        )
        cos, sin = torch.randn(2, 288, 64, device=dev)
        cos, sin = torch.cos(cos), torch.sin(cos)
        table = product.rotation_table(cos, sin, cut.tokens)
        gains = Gains(
            (torch.rand(1024, device=dev) + 0.2).bfloat16(),
            (torch.rand(1024, device=dev) + 0.5).bfloat16(),
            None,
        )
        place = product.meeting(s, 1024, torch.device(dev))
        sums = torch.full((B, 2, 1024), float("nan"), device=dev)
        row = {"i": i, "kind": kind, "rows": rows, "k": k, "cut": c}
        try:
            if not product.suits(
                cut, {"plain": 0, "qkv": 1, "swiglu": 2, "write": 3}[kind], s, ws[0]
            ):
                raise RuntimeError("does not suit")

            def run(w, cut=cut, valid=None):
                if kind == "plain":
                    product.plain(a, w, y, cut)
                elif kind == "qkv":
                    product.qkv(a, w, table, y, s, 8, 8, 1e-6, cut)
                elif kind == "swiglu":
                    product.swiglu(a, w, y, sums if rows < 1000 else None, valid, s, cut)
                else:
                    product.write(a, w, x, y, gains, valid, s, 1e-5, place, cut)

            t0 = time.time()
            run(ws[0])
            torch.cuda.synchronize()
            row["first_s"] = round(time.time() - t0, 2)
            f = a.float() @ ws[0].float().T
            with forced_backend("reference"):
                if kind == "plain":
                    truth = f
                elif kind == "qkv":
                    q, kk, v = qk_norm_rope(f.view(B, 288, -1), cos, sin, 8, 8, 1e-6)
                    truth = torch.cat(
                        [t.transpose(1, 2).flatten(-2) for t in (q, kk, v)], -1
                    ).flatten(0, 1)
                elif kind == "swiglu":
                    truth = swiglu(f)
                else:
                    truth = split_merge(
                        x.float().view(B, 288, -1),
                        f.view(B, 288, -1),
                        *[g if g is None else g.float() for g in gains],
                        Segments((256, 32)),
                        1e-5,
                    ).flatten(0, 1)
            row["error"] = rel(y, truth)
            row["cast"] = rel(truth.bfloat16(), truth)
            row["max"] = (y.float() - truth).abs().max().item()
            if kind == "swiglu" and rows < 1000:
                v = a.float().view(B, 288, -1)
                t3 = torch.stack([v[:, :256].sum(1), v[:, 256:].sum(1)], 1)
                row["error_sums"] = rel(sums, t3)
            if kind == "write":
                valid = torch.tensor(
                    [(j * 7) % 33 for j in range(B)], device=dev, dtype=torch.int32
                )
                run(ws[0], valid=valid)
                torch.cuda.synchronize()
                seg = s.segments(valid, torch.device(dev))
                with forced_backend("reference"):
                    t2 = split_merge(
                        x.float().view(B, 288, -1),
                        f.view(B, 288, -1),
                        *[g if g is None else g.float() for g in gains],
                        seg,
                        1e-5,
                    ).flatten(0, 1)
                row["error_masked"] = rel(y, t2)
            from mvsplit.kernels.hopper.product import _kernel

            if row["error"] < 0.02:
                for pdl in (False, True):
                    cc = cut.with_pdl(pdl)
                    row["us_pdl" if pdl else "us"] = round(
                        graph_time(lambda: [run(w, cc) for w in ws] and None, 15) / L * 1e6, 2
                    )
                row["cublas"] = round(
                    graph_time(lambda: [functional.linear(a, w) for w in ws] and None, 15)
                    / L
                    * 1e6,
                    2,
                )
                row["tflops"] = round(2 * rows * n * k / row["us"] / 1e6, 1)
            kid = {"plain": 0, "qkv": 1, "swiglu": 2, "write": 3}[kind]
            row["clusters"] = _kernel(
                cut, kid, k, 256 if kind == "write" else 0, a.dtype, 0
            ).most_clusters
        except Exception as e:
            row["failed"] = f"{type(e).__name__}: {e}"[:300]
            print("ROW", json.dumps(row), flush=True)
            if "CUDA" in row["failed"] or "fault" in row["failed"] or "illegal" in row["failed"]:
                os._exit(3)
            continue
        print("ROW", json.dumps(row), flush=True)


def main():
    rows, first, deadline = [], 0, time.time() + float(sys.argv[1])
    while first < len(V) and time.time() < deadline:
        p = subprocess.Popen(
            [sys.executable, "-u", __file__, "worker", str(first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        last, quiet, tail = first - 1, time.time(), []
        buf = ""
        os.set_blocking(p.stdout.fileno(), False)
        while p.poll() is None or buf:
            chunk = None
            try:
                chunk = p.stdout.read()
            except Exception:
                chunk = None
            if chunk:
                buf += chunk
                quiet = time.time()
                *lines, buf = buf.split("\n")
                for line in lines:
                    if line.startswith("START"):
                        last = int(line.split()[1])
                    elif line.startswith("ROW"):
                        rows.append(json.loads(line[4:]))
                        print(line[4:], flush=True)
                        json.dump(rows, open(f"{out_dir}/probe.json", "w"))
                    else:
                        tail.append(line)
                        print(line[:200], flush=True)
            elif p.poll() is not None:
                break
            else:
                time.sleep(0.05)
            if time.time() - quiet > 25 or time.time() > deadline:
                p.kill()
                print("killed at", last, flush=True)
                break
        p.wait()
        if p.returncode == 0:
            break
        print("worker ended", p.returncode, "at", last, "\n".join(tail[-6:]), flush=True)
        if last < first:
            break
        first = last + 1


if __name__ == "__main__":
    worker(int(sys.argv[2])) if sys.argv[1] == "worker" else main()
