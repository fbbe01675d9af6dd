//! The WGSL sources: embedded, or read from a folder (`--shaders DIR`), with four line directives put in place:
//!
//! - `//#include "file.wgsl"`: that file's text, once.
//! - `//#const NAME 16`: a constant (or a type) with its default; a launch's constants replace it.
//! - `//#for i N` ... `//#end`: the lines between, N times (a number or a constant), with `${i}` as 0, 1, ... N-1. WGSL
//!   has no macros, and accumulators stay in registers only where they are named one by one.
//! - `//#macro NAME a b` ... `//#endmacro`: lines for later, put in by `//#call NAME x y + 1` with `${a}` as `x` and
//!   `${b}`, the last, as all that follows. A macro may call those before it.

use crate::backend::source::SourceFolder;
use crate::{Error, Result};
use std::collections::HashMap;

/// `shaders/`, or a folder in its place.
#[derive(Clone, Debug)]
pub struct ShaderSource(pub SourceFolder);

impl Default for ShaderSource {
    fn default() -> Self {
        ShaderSource(SourceFolder::wgsl())
    }
}

/// Constants of a launch: name and value as WGSL writes it.
pub type Consts = Vec<(&'static str, String)>;

impl ShaderSource {
    /// The WGSL of `name` for a launch's constants.
    ///
    /// # Errors
    /// [`Error::Input`] where a file does not exist or a directive is malformed.
    pub fn assemble(&self, name: &str, consts: &Consts) -> Result<String> {
        let mut lines = vec![];
        self.include(name, &mut vec![], &mut lines)?;
        let mut values: Vec<(String, String)> = consts
            .iter()
            .map(|(k, v)| (k.to_string(), v.clone()))
            .collect();
        let mut body = vec![];
        for line in macros(name, lines)? {
            match line.trim().strip_prefix("//#const ") {
                Some(rest) => {
                    let (key, value) = rest
                        .trim()
                        .split_once(' ')
                        .ok_or_else(|| malformed(name, &line))?;
                    if !values.iter().any(|v| v.0 == key) {
                        values.push((key.into(), value.trim().into()));
                    }
                }
                None => body.push(line),
            }
        }
        let mut out = String::new();
        for (key, value) in &values {
            let word = if is_type(value) { "alias" } else { "const" };
            out.push_str(&format!("{word} {key} = {value};\n"));
        }
        let lines: Vec<&str> = body.iter().map(String::as_str).collect();
        expand(name, &lines, &values, &mut out)?;
        Ok(out)
    }

    fn include(&self, name: &str, seen: &mut Vec<String>, out: &mut Vec<String>) -> Result<()> {
        if seen.iter().any(|s| s == name) {
            return Ok(());
        }
        seen.push(name.to_string());
        for line in self.0.read(name)?.lines() {
            let file = line.trim().strip_prefix("//#include \"");
            match file.and_then(|l| l.strip_suffix('"')) {
                Some(file) => self.include(file, seen, out)?,
                None => out.push(line.to_string()),
            }
        }
        Ok(())
    }
}

/// Takes the macros out of `lines` and puts in what is called.
fn macros(name: &str, lines: Vec<String>) -> Result<Vec<String>> {
    let mut known: HashMap<String, (Vec<String>, Vec<String>)> = HashMap::new();
    let mut out = vec![];
    let mut open: Option<(String, Vec<String>, Vec<String>)> = None;
    for line in lines {
        let text = line.trim();
        if let Some(head) = text.strip_prefix("//#macro ") {
            let mut words = head.split_whitespace().map(String::from);
            let title = words.next().filter(|_| open.is_none());
            let title = title.ok_or_else(|| malformed(name, &line))?;
            open = Some((title, words.collect(), vec![]));
        } else if text == "//#endmacro" {
            let (title, arguments, body) = open.take().ok_or_else(|| malformed(name, &line))?;
            known.insert(title, (arguments, body));
        } else {
            let to = open.as_mut().map_or(&mut out, |m| &mut m.2);
            match text.strip_prefix("//#call ") {
                Some(call) => {
                    let (title, rest) = call.split_once(' ').unwrap_or((call, ""));
                    let found = known.get(title);
                    let (names, body) = found.ok_or_else(|| malformed(name, &line))?;
                    let values: Vec<&str> = rest.splitn(names.len().max(1), ' ').collect();
                    if values.len() < names.len() {
                        return Err(malformed(name, &line));
                    }
                    to.extend(body.iter().map(|l| {
                        names
                            .iter()
                            .zip(&values)
                            .fold(l.clone(), |l, (n, v)| l.replace(&format!("${{{n}}}"), v))
                    }));
                }
                None => to.push(line),
            }
        }
    }
    match open {
        Some((title, ..)) => Err(malformed(
            name,
            &format!("//#macro {title} without its end"),
        )),
        None => Ok(out),
    }
}

fn is_type(value: &str) -> bool {
    matches!(value, "f32" | "i32" | "u32" | "f16") || value.starts_with("vec")
}

fn malformed(name: &str, line: &str) -> Error {
    Error::input(format!("{name}: malformed directive: {}", line.trim()))
}

/// Unrolls the `//#for` blocks of `lines`, outermost first.
fn expand(name: &str, lines: &[&str], values: &[(String, String)], out: &mut String) -> Result<()> {
    let mut i = 0;
    while i < lines.len() {
        let line = lines[i];
        let Some(head) = line.trim().strip_prefix("//#for ") else {
            out.push_str(line);
            out.push('\n');
            i += 1;
            continue;
        };
        let (var, count) = head
            .trim()
            .split_once(' ')
            .ok_or_else(|| malformed(name, line))?;
        let value = values.iter().find(|v| v.0 == count);
        let count: usize = value
            .map_or(count, |v| v.1.as_str())
            .trim_end_matches('u')
            .parse()
            .map_err(|_| malformed(name, line))?;
        let mut depth = 1;
        let mut end = i + 1;
        while end < lines.len() {
            let l = lines[end].trim();
            depth += usize::from(l.starts_with("//#for "));
            depth -= usize::from(l == "//#end");
            if depth == 0 {
                break;
            }
            end += 1;
        }
        if end == lines.len() {
            return Err(malformed(name, line));
        }
        let mark = format!("${{{var}}}");
        for n in 0..count {
            let n = n.to_string();
            let block: Vec<String> = lines[i + 1..end]
                .iter()
                .map(|l| l.replace(&mark, &n))
                .collect();
            let block: Vec<&str> = block.iter().map(String::as_str).collect();
            expand(name, &block, values, out)?;
        }
        i = end + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::naga;

    /// Every embedded shader parses and validates with its default constants.
    #[test]
    fn naga_accepts_every_shader() {
        let source = ShaderSource::default();
        for name in source.0.names() {
            let text = source.assemble(name, &vec![]).unwrap();
            let module = naga::front::wgsl::parse_str(&text)
                .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&text)));
            naga::valid::Validator::new(
                naga::valid::ValidationFlags::all(),
                naga::valid::Capabilities::SUBGROUP,
            )
            .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
            .subgroup_operations(naga::valid::SubgroupOperationSet::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&text)));
        }
    }

    #[test]
    fn blocks_unroll_and_constants_replace_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let text = "//#const N 3\n//#for i N\n//#for j 2\nv${i}${j}\n//#end\n//#end\n";
        std::fs::write(dir.path().join("t.wgsl"), text).unwrap();
        let source = ShaderSource(SourceFolder::wgsl().replaced_by(dir.path()).unwrap());
        let out = source
            .assemble("t.wgsl", &vec![("N", "2".to_string())])
            .unwrap();
        assert_eq!(out, "const N = 2;\nv00\nv01\nv10\nv11\n");
        let text = "//#macro add to what\n${to} += ${what};\n//#endmacro\n//#for i 2\n//#call add v${i} a + b\n//#end\n";
        std::fs::write(dir.path().join("t.wgsl"), text).unwrap();
        let out = source.assemble("t.wgsl", &vec![]).unwrap();
        assert_eq!(out, "v0 += a + b;\nv1 += a + b;\n");
        for wrong in [
            "//#for i 2\n",
            "//#call none\n",
            "//#macro m\n",
            "//#endmacro\n",
        ] {
            std::fs::write(dir.path().join("t.wgsl"), wrong).unwrap();
            assert!(source.assemble("t.wgsl", &vec![]).is_err(), "{wrong}");
        }
    }
}
