//! Cases on the command line: `op`, `op(key=value,...)`, with `dtype=bf16` for the precision and ranges as `n=1:64:x2`.

use tilewright::backend::cuda::Precision;
use tilewright::ops::{Room, room};
use tilewright::{Error, Result};

/// An op, and its cases where the text names any.
pub struct CaseText {
    /// The op's room.
    pub room: &'static Room,
    /// Its parameters; several where a value is a range; `None` for the op alone.
    pub params: Option<Vec<String>>,
    /// What `dtype=` says.
    pub precision: Option<Precision>,
}

/// `8`, `1,8,32`, or `1:64:x2` (from, to, factor).
pub fn sweep(text: &str) -> Result<Vec<usize>, String> {
    let number = |s: &str| super::source::positive(s.trim());
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        [list] => list.split(',').map(number).collect(),
        [from, to, factor] => {
            let (from, to) = (number(from)?, number(to)?);
            let factor = match factor.strip_prefix('x').map(number) {
                Some(Ok(f)) if f > 1 => f,
                _ => return Err("the factor is written x2, x4, ...".into()),
            };
            let all: Vec<usize> = std::iter::successors(Some(from), |v| v.checked_mul(factor))
                .take_while(|&v| v <= to)
                .collect();
            match all.is_empty() {
                true => Err(format!("there is nothing from {from} to {to}")),
                false => Ok(all),
            }
        }
        _ => Err("give a number, a list 1,8,32 or a range 1:64:x2".into()),
    }
}

/// Reads `text`; whether the shape rule takes the cases is seen when they are built.
///
/// # Errors
/// There is no such op, the bracket is not closed, or a range or precision is malformed.
pub fn case(text: &str) -> Result<CaseText> {
    let Some((op, rest)) = text.split_once('(') else {
        return Ok(CaseText {
            room: room(text)?,
            params: None,
            precision: None,
        });
    };
    let rest = rest.trim_end().strip_suffix(')').ok_or_else(|| {
        Error::input(format!(
            "`{text}` has no closing bracket; a case is op(key=value,...)"
        ))
    })?;
    let mut precision = None;
    let mut all = vec![String::new()];
    for part in rest.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let values = match part.split_once('=') {
            Some(("dtype", p)) => {
                precision = Some(p.parse()?);
                continue;
            }
            Some((key, range)) if range.contains(':') => {
                let values = sweep(range).map_err(|e| Error::input(format!("`{part}`: {e}")))?;
                values.iter().map(|v| format!("{key}={v}")).collect()
            }
            _ => vec![part.to_string()],
        };
        let join = |before: &String, v: &String| match before.is_empty() {
            true => v.clone(),
            false => format!("{before},{v}"),
        };
        all = all
            .iter()
            .flat_map(|before| values.iter().map(move |v| join(before, v)))
            .collect();
    }
    Ok(CaseText {
        room: room(op)?,
        params: Some(all),
        precision,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps() {
        assert_eq!(sweep("8").unwrap(), [8]);
        assert_eq!(sweep("1,8, 32").unwrap(), [1, 8, 32]);
        assert_eq!(sweep("1:9:x2").unwrap(), [1, 2, 4, 8]);
        for bad in ["", "0", "a", "4:1:x2", "1:8:2", "1:8:x1", "1:8"] {
            assert!(sweep(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cases_with_ranges_and_precision() {
        let c = case("linear(m=1:4:x2, i=3,o=1:2:x2,dtype=bf16)").unwrap();
        assert_eq!(
            (c.room.name, c.precision),
            ("linear", Some(Precision::Bf16))
        );
        let params = c.params.unwrap();
        assert_eq!(params.len(), 6);
        assert_eq!(
            (params[0].as_str(), params[5].as_str()),
            ("m=1,i=3,o=1", "m=4,i=3,o=2")
        );
        assert!(case("add").unwrap().params.is_none());
        assert_eq!(case("add()").unwrap().params.unwrap(), [""]);
        for bad in ["none", "add(n=1", "add(n=1:2)", "add(dtype=f8)"] {
            assert!(case(bad).is_err(), "{bad}");
        }
    }
}
