//! Tests of the checker: kernels broken on purpose, one at a time, each of which `check` must find and name.
//!
//! Every test copies the kernel folder, changes one line, and runs `check` on the copy. Where the line is no longer in
//! the source, the test says so: break another one in the same way.

use std::path::Path;
use std::process::Command;

/// How a kernel is broken, and how `check` must see it.
struct Broken<'a> {
    /// `wgpu` or `cuda:sim`.
    backend: &'a str,
    /// The file, within `shaders/` or `kernels/`.
    file: &'a str,
    /// What is replaced, by what. All occurrences.
    from: &'a str,
    to: &'a str,
    /// The case that runs into it.
    case: &'a str,
    /// More flags of `check`.
    flags: &'a [&'a str],
    /// Words of the failure.
    says: &'a [&'a str],
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => std::fs::write(&target, std::fs::read(entry.path()).unwrap()).unwrap(),
        }
    }
}

fn present(backend: &str) -> bool {
    let there = match backend {
        "wgpu" => tilewright::backend::wgpu::adapters().map(|_| ()),
        _ => tilewright::backend::cuda::Nvrtc::get().map(|_| ()),
    };
    if let Err(e) = &there {
        assert!(std::env::var("CI").is_err(), "{e}");
        println!("skipped: {e}");
    }
    there.is_ok()
}

/// Status and standard error of `check` on `dir`.
fn check(b: &Broken, dir: &Path) -> (Option<i32>, String) {
    let folder = if b.backend == "wgpu" {
        "--shaders"
    } else {
        "--kernels"
    };
    let out = Command::new(env!("CARGO_BIN_EXE_tilewright"))
        .args(["check", b.case, "--backend", b.backend, folder])
        .arg(dir)
        .args(b.flags)
        .output()
        .unwrap();
    (
        out.status.code(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    )
}

fn found(b: &Broken) {
    if !present(b.backend) {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = if b.backend == "wgpu" {
        "shaders"
    } else {
        "kernels"
    };
    let dir = tempfile::tempdir().unwrap();
    copy(&root.join(folder), dir.path());
    let (status, err) = check(b, dir.path());
    assert_eq!(
        status,
        Some(0),
        "the kernel is wrong before it is broken: {err}"
    );
    let path = dir.path().join(b.file);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(
        text.contains(b.from),
        "{} has no `{}` any more: break another line in its place",
        b.file,
        b.from
    );
    std::fs::write(&path, text.replace(b.from, b.to)).unwrap();
    let (status, err) = check(b, dir.path());
    assert_eq!(status, Some(1), "not found: {err}");
    assert!(err.contains("FAILED") && err.contains(b.case), "{err}");
    assert!(
        err.contains(&format!("repeat: tilewright check '{}'", b.case)),
        "{err}"
    );
    for says in b.says {
        assert!(err.contains(says), "no {says:?} in: {err}");
    }
}

/// The last column of the last tile belongs to nobody.
#[test]
fn off_by_one_at_a_tiles_edge() {
    found(&Broken {
        backend: "wgpu",
        file: "gemm_tile.wgsl",
        from: "if n >= columns { continue; }",
        to: "if n + 1u >= columns { continue; }",
        case: "linear(m=5,i=9,o=65)",
        flags: &["--variants"],
        says: &["tile", "nobody wrote it"],
    });
}

/// The sum leaves out the last element of each row.
#[test]
fn off_by_one_in_a_rows_sum() {
    found(&Broken {
        backend: "cuda:sim",
        file: "layer_norm.cu",
        from: "for (int k = 0; k < VEC; ++k) sum += v[j].v[k];",
        to: "for (int k = 0; k < VEC; ++k) sum += c + 1 < items || k + 1 < VEC ? v[j].v[k] : 0.0f;",
        case: "layer_norm(n=2,t=3,c=7)",
        flags: &[],
        says: &["y0[", "allowed"],
    });
}

/// A second sum writes over the partial sums of the first while warps still read them.
#[test]
fn missing_barrier() {
    found(&Broken {
        backend: "cuda:sim",
        file: "common/reduce.cuh",
        from: "__syncthreads();  // the last use of `parts` is over",
        to: "",
        case: "layer_norm(n=1,t=1,c=4099)",
        flags: &[],
        says: &["layer_norm", "reduce.cuh:", "race"],
    });
}

/// Partial sums are read before every warp has written its own.
#[test]
fn missing_barrier_before_a_read() {
    found(&Broken {
        backend: "cuda:sim",
        file: "common/reduce.cuh",
        from: "if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;\n        __syncthreads();",
        to: "if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;",
        case: "layer_norm(n=1,t=1,c=4099)",
        flags: &[],
        says: &["layer_norm", "reduce.cuh:", "shared memory"],
    });
}

/// Parts and elements of a partial sum exchanged.
#[test]
fn swapped_stride() {
    found(&Broken {
        backend: "wgpu",
        file: "reduce.wgsl",
        from: "sum += x[part * p.stride + at];",
        to: "sum += x[part + at * p.stride];",
        case: "layer_norm(n=3,t=5,c=8)",
        flags: &[],
        says: &["on wgpu", "allowed"],
    });
}

/// Threads beyond the end store too.
#[test]
fn unguarded_tail() {
    found(&Broken {
        backend: "cuda:sim",
        file: "pad2d.cu",
        from: "if (e >= n) return;",
        to: "",
        case: "pad2d(n=1,h=3,w=3,c=5,oh=4,ow=4)",
        flags: &[],
        says: &["pad2d.cu:", "past the end of `x0`"],
    });
}

/// The accumulator loses its low 16 bits after each multiply-add.
#[test]
fn bf16_accumulation() {
    found(&Broken {
        backend: "cuda:sim",
        file: "common/gemm_core.cuh",
        from: "acc[i][j] = fmaf(fa[i], fb[j], acc[i][j]);",
        to: "acc[i][j] = __uint_as_float(__float_as_uint(fmaf(fa[i], fb[j], acc[i][j])) & 0xffff0000u);",
        case: "linear(m=9,i=40,o=12)",
        flags: &[],
        says: &["y0[", "allowed"],
    });
}

/// The accumulator is rounded to float16 after each multiply-add.
#[test]
fn f16_accumulation() {
    found(&Broken {
        backend: "wgpu",
        file: "gemm_tile.wgsl",
        from: "acc[i] = fma(vec4(ta[at + ty * 4u + i]), b, acc[i]);",
        to: "let v = fma(vec4(ta[at + ty * 4u + i]), b, acc[i]);\n\
             acc[i] = vec4(unpack2x16float(pack2x16float(v.xy)), unpack2x16float(pack2x16float(v.zw)));",
        case: "linear(m=9,i=40,o=12)",
        flags: &["--variants"],
        says: &["tile", "y0[", "allowed"],
    });
}

/// One invocation gives NaN.
#[test]
fn nan_in_one_lane() {
    found(&Broken {
        backend: "wgpu",
        file: "elementwise.wgsl",
        from: "y1[i] = act_value(p.f, a[i]);",
        to: "y1[i] = act_value(p.f, a[i]) * select(T(1.0), T(sqrt(-f32(i))), l == 5u);",
        case: "act(n=3,c=9,f=gelu)",
        flags: &[],
        says: &["y0[", "is NaN"],
    });
}

/// The second result stays as it was.
#[test]
fn output_not_written() {
    found(&Broken {
        backend: "wgpu",
        file: "layer_norm.wgsl",
        from: "fwd_rstd[row] = rstd;",
        to: "",
        case: "layer_norm(n=3,t=5,c=8)",
        flags: &[],
        says: &["y2[", "nobody wrote it"],
    });
}

/// The same on CUDA, where the simulator knows what was never written.
#[test]
fn output_not_written_on_cuda() {
    found(&Broken {
        backend: "cuda:sim",
        file: "layer_norm.cu",
        from: "rstd[row] = r;",
        to: "",
        case: "layer_norm(n=3,t=5,c=8)",
        flags: &[],
        says: &["layer_norm.cu:", "nobody wrote"],
    });
}

/// A kernel that writes into its operand.
#[test]
fn operand_overwritten() {
    found(&Broken {
        backend: "wgpu",
        file: "elementwise.wgsl",
        from: "y1[i] = act_value(p.f, a[i]);",
        to: "y1[i] = act_value(p.f, a[i]);\n        if i == 2u { a[i] = T(7.0); }",
        case: "act(n=3,c=9,f=relu)",
        flags: &[],
        says: &["operand x0"],
    });
}
