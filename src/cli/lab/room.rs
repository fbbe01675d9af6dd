//! `lab new`: the skeleton of a room, made of the example that docs/add-an-op.md walks through.

use super::super::global::Global;
use super::super::output::{json, print};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// The page whose code blocks are the template; a test adds the op that they make.
const PAGE: &str = include_str!("../../../docs/add-an-op.md");

/// The first code block in `language` after `heading`.
fn block<'a>(heading: &str, language: &str) -> Result<&'a str> {
    let part = PAGE.split_once(heading).map(|p| p.1);
    let part = part.and_then(|p| p.split_once(&format!("```{language}\n")));
    part.and_then(|p| p.1.split_once("```"))
        .map(|p| p.0)
        .ok_or_else(|| {
            Error::run(format!(
                "docs/add-an-op.md has no {language} block under {heading}"
            ))
        })
}

/// `relu6` as a type: `Relu6`; `hard_swish`: `HardSwish`.
fn type_name(op: &str) -> String {
    let word = |w: &str| {
        let mut chars = w.chars();
        let first = chars.next().map(|c| c.to_ascii_uppercase());
        first.into_iter().chain(chars).collect::<String>()
    };
    op.split('_').map(word).collect()
}

/// `text` with the registry lines of `op`: its module in alphabetical order, its room at the end of the list.
fn registered(text: &str, op: &str) -> Result<String> {
    let malformed = || Error::input("src/ops/mod.rs has no list of modules or of ROOMS");
    let module = format!("pub mod {op};");
    let mut lines: Vec<String> = text.lines().map(String::from).collect();
    let modules = |l: &&String| l.starts_with("pub mod ");
    let last = lines
        .iter()
        .rposition(|l| modules(&l))
        .ok_or_else(malformed)?;
    let after = lines.iter().position(|l| modules(&l) && *l > module);
    lines.insert(after.unwrap_or(last + 1), module);
    let rooms = lines.iter().position(|l| l.starts_with("pub const ROOMS"));
    let rooms = rooms.ok_or_else(malformed)?;
    let end = lines[rooms..]
        .iter()
        .position(|l| l == "];")
        .ok_or_else(malformed)?;
    lines.insert(rooms + end, format!("    &{op}::ROOM,"));
    Ok(lines.join("\n") + "\n")
}

/// Writes the room of `op` into the checkout in the working folder.
pub fn new(g: &Global, op: &str) -> Result<ExitCode> {
    let letters = op
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !letters || !op.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(Error::input(format!(
            "{op}: an op's name is of lower-case letters, digits and _, as conv2d or layer_norm"
        )));
    }
    let registry = Path::new("src/ops/mod.rs");
    let text = std::fs::read_to_string(registry).map_err(|e| {
        Error::reading(registry, e).context("run `lab new` in a checkout of the sources")
    })?;
    let named = |text: &str| text.replace("relu6", op).replace("Relu6", &type_name(op));
    let files = [
        (format!("src/ops/{op}.rs"), block("## 1. The room", "rust")?),
        (
            format!("shaders/{op}.wgsl"),
            block("## 2. The shader", "wgsl")?,
        ),
        (
            format!("kernels/{op}.cu"),
            block("## 3. The CUDA kernels", "cuda")?,
        ),
    ];
    let folder = format!("src/ops/{op}");
    for path in files.iter().map(|f| f.0.as_str()).chain([folder.as_str()]) {
        if Path::new(path).exists() {
            return Err(Error::input(format!(
                "{path} is already there; choose another name"
            )));
        }
    }
    let registry_text = registered(&text, op)?;
    for (path, body) in &files {
        write_atomic(Path::new(path), named(body).as_bytes())?;
    }
    write_atomic(registry, registry_text.as_bytes())?;
    let written: Vec<&str> = files.iter().map(|f| f.0.as_str()).collect();
    match g.json {
        true => json(&json!({"written": written, "registered": "src/ops/mod.rs"}))?,
        false => print(&format!(
            "{}\nsrc/ops/mod.rs: the module and the room\n\nIt computes min(max(x, 0), 6) as docs/add-an-op.md explains: \
             put your formula in its place, then\n  cargo run -- check {op}\n  cargo run -- lab {op} --backend wgpu\n",
            written.join("\n")
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_registry_lines() {
        assert_eq!(type_name("relu6"), "Relu6");
        assert_eq!(type_name("hard_swish"), "HardSwish");
        let text = "pub mod act;\npub mod tokens;\n\npub const ROOMS: &[&Room] = &[\n    &act::ROOM,\n];\n";
        let want = "pub mod act;\npub mod hard_swish;\npub mod tokens;\n\npub const ROOMS: &[&Room] = &[\n    &act::ROOM,\n    \
                    &hard_swish::ROOM,\n];\n";
        assert_eq!(registered(text, "hard_swish").unwrap(), want);
        assert!(
            registered(text, "zz")
                .unwrap()
                .contains("pub mod tokens;\npub mod zz;")
        );
        assert!(registered("nothing", "zz").is_err());
    }

    #[test]
    fn the_page_has_every_part() {
        assert!(
            block("## 1. The room", "rust")
                .unwrap()
                .contains("pub const ROOM: Room")
        );
        assert!(
            block("## 2. The shader", "wgsl")
                .unwrap()
                .contains("@compute")
        );
        assert!(
            block("## 3. The CUDA kernels", "cuda")
                .unwrap()
                .contains("__global__")
        );
        assert!(block("## 99", "rust").is_err());
    }
}
