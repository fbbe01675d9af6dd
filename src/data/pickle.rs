//! The part of Python's pickle format that data archives use (protocols 0 to 5: numbers, strings, lists, tuples,
//! dictionaries, numpy arrays of bytes). Nothing is ever called: a pickled function is only a name here.

use crate::{Error, Result};

/// An object's place in the arena.
type Id = usize;
/// A file of 31 MB has about 20,000 objects; more than this is not a data batch.
const MAX_OBJECTS: usize = 20_000_000;

#[derive(Debug, Clone)]
enum Value<'a> {
    None,
    Int(i64),
    Bytes(&'a [u8]),
    /// Bytes that had to be made (UTF-8 text read back as Latin-1).
    Made(Vec<u8>),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A function or class by name.
    Global(String),
    /// `function(arguments)`, and the state it was given.
    Call {
        function: Id,
        arguments: Id,
        state: Option<Id>,
    },
}

/// A pickled dictionary.
#[derive(Debug)]
pub(crate) struct Dict<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::input(format!("pickle: {what}"))
}

impl Dict<'_> {
    fn get(&self, key: &str) -> Result<Id> {
        let Value::Dict(items) = &self.values[self.root] else {
            return Err(bad("not a dictionary"));
        };
        let is = |id: Id| self.raw(id).is_some_and(|b| b == key.as_bytes());
        items
            .iter()
            .rev()
            .find(|(k, _)| is(*k))
            .map(|(_, v)| *v)
            .ok_or_else(|| bad(format!("no `{key}` in it")))
    }

    fn raw(&self, id: Id) -> Option<&[u8]> {
        match &self.values[id] {
            Value::Bytes(b) => Some(b),
            Value::Made(b) => Some(b),
            _ => None,
        }
    }

    /// A list of whole numbers.
    pub(crate) fn integers(&self, key: &str) -> Result<Vec<i64>> {
        let (Value::List(ids) | Value::Tuple(ids)) = &self.values[self.get(key)?] else {
            return Err(bad(format!("`{key}` is not a list")));
        };
        ids.iter()
            .map(|id| match self.values[*id] {
                Value::Int(v) => Ok(v),
                _ => Err(bad(format!(
                    "`{key}` holds something that is not a whole number"
                ))),
            })
            .collect()
    }

    /// Bytes, or the bytes of a C-ordered numpy array of uint8.
    pub(crate) fn bytes(&self, key: &str) -> Result<&[u8]> {
        let id = self.get(key)?;
        if let Some(bytes) = self.raw(id) {
            return Ok(bytes);
        }
        self.array(id)
            .ok_or_else(|| bad(format!("`{key}` is not an array of bytes in C order")))
    }

    /// The bytes of a numpy array of uint8: `_reconstruct` with the state (version, shape, type, Fortran order, data),
    /// or, in protocol 5, `_frombuffer(data, type, shape, order)`.
    fn array(&self, id: Id) -> Option<&[u8]> {
        let Value::Call {
            function,
            arguments,
            state,
        } = &self.values[id]
        else {
            return None;
        };
        let Value::Global(function) = &self.values[*function] else {
            return None;
        };
        let (kind, c_order, data) = match state {
            Some(state) if function.ends_with("._reconstruct") => match self.tuple(*state)? {
                [_, _, kind, fortran, data] => {
                    (*kind, matches!(self.values[*fortran], Value::Int(0)), *data)
                }
                _ => return None,
            },
            None if function.ends_with("._frombuffer") => match self.tuple(*arguments)? {
                [data, kind, _, order] => (*kind, self.raw(*order) == Some(b"C"), *data),
                _ => return None,
            },
            _ => return None,
        };
        let Value::Call { arguments, .. } = &self.values[kind] else {
            return None;
        };
        let uint8 = self
            .tuple(*arguments)?
            .first()
            .and_then(|name| self.raw(*name))
            == Some(b"u1");
        if uint8 && c_order {
            self.raw(data)
        } else {
            None
        }
    }

    fn tuple(&self, id: Id) -> Option<&[Id]> {
        match &self.values[id] {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }
}

/// Reads a pickled dictionary.
///
/// # Errors
/// [`Error::Input`] where the bytes are cut short, use something outside of the subset, or hold no dictionary.
pub(crate) fn parse(bytes: &[u8]) -> Result<Dict<'_>> {
    let mut machine = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
    };
    let root = machine.run()?;
    match machine.values[root] {
        Value::Dict(_) => Ok(Dict {
            values: machine.values,
            root,
        }),
        _ => Err(bad("holds no dictionary")),
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<(u64, Id)>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let n = usize::try_from(n)
            .ok()
            .filter(|n| *n <= rest.len())
            .ok_or_else(|| bad("cut short"))?;
        self.at += n;
        Ok(&rest[..n])
    }

    /// A little-endian number of `n` bytes.
    fn number(&mut self, n: u64) -> Result<u64> {
        Ok(self
            .take(n)?
            .iter()
            .rev()
            .fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    fn line(&mut self) -> Result<&'a [u8]> {
        let end = self.bytes[self.at..]
            .iter()
            .position(|b| *b == b'\n')
            .ok_or_else(|| bad("cut short"))?;
        let line = self.take(end as u64)?;
        self.at += 1;
        Ok(line)
    }

    fn text_number(&mut self) -> Result<i64> {
        let line = self.line()?;
        let text = std::str::from_utf8(line).unwrap_or_default();
        text.trim_end_matches('L')
            .parse()
            .map_err(|_| bad("a number that is none"))
    }

    fn push(&mut self, value: Value<'a>) -> Result<()> {
        if self.values.len() >= MAX_OBJECTS {
            return Err(bad("too many objects for a data batch"));
        }
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        // Below a mark lies what belongs to an object that is still being made.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(bad("an operation without its operands"));
        }
        self.stack
            .pop()
            .ok_or_else(|| bad("an operation without its operands"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self
            .marks
            .pop()
            .ok_or_else(|| bad("an operation without its mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<Id> {
        self.stack
            .last()
            .copied()
            .ok_or_else(|| bad("an operation without its operands"))
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, items: &[Id]) -> Result<()> {
        let to = self.top()?;
        match &mut self.values[to] {
            Value::List(list) => list.extend_from_slice(items),
            _ => return Err(bad("appends to something that is not a list")),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let to = self.top()?;
        match (&mut self.values[to], items.len() % 2) {
            (Value::Dict(dict), 0) => dict.extend(items.chunks_exact(2).map(|kv| (kv[0], kv[1]))),
            _ => return Err(bad("sets an item of something that is not a dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, key: u64) -> Result<()> {
        let id = self.top()?;
        // Writers count up, so that this is a push; anything else is legal and rare.
        match self.memo.binary_search_by_key(&key, |m| m.0) {
            Ok(i) => self.memo[i].1 = id,
            Err(i) if self.memo.len() - i < 1000 => self.memo.insert(i, (key, id)),
            Err(_) => return Err(bad("a memo out of order")),
        }
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<()> {
        let i = self
            .memo
            .binary_search_by_key(&key, |m| m.0)
            .map_err(|_| bad("recalls what was never stored"))?;
        self.stack.push(self.memo[i].1);
        Ok(())
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        // Python 3 writes bytes in protocol 2 as `_codecs.encode(text, "latin1")`.
        if let (Value::Global(name), Value::Tuple(args)) =
            (&self.values[function], &self.values[arguments])
            && name == "_codecs.encode"
            && let Some(Value::Bytes(text)) = args.first().map(|a| &self.values[*a])
        {
            let text = std::str::from_utf8(text).map_err(|_| bad("text that is not UTF-8"))?;
            let made: Option<Vec<u8>> = text
                .chars()
                .map(|c| u8::try_from(u32::from(c)).ok())
                .collect();
            return self.push(Value::Made(
                made.ok_or_else(|| bad("text that is not Latin-1"))?,
            ));
        }
        self.push(Value::Call {
            function,
            arguments,
            state: None,
        })
    }

    fn run(&mut self) -> Result<Id> {
        loop {
            // Recalls and duplicates push without making a value: the same bound holds for them.
            if self.stack.len() > MAX_OBJECTS {
                return Err(bad("too many objects for a data batch"));
            }
            let op = self.take(1)?[0];
            match op {
                b'.' => return self.pop(),
                0x80 => {
                    let version = self.number(1)?;
                    if version > 5 {
                        return Err(bad(format!("protocol {version}, but 0 to 5 are known")));
                    }
                }
                0x95 => drop(self.take(8)?), // a frame's length
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Int(1))?,
                0x89 => self.push(Value::Int(0))?,
                b'I' | b'L' => {
                    let v = self.text_number()?;
                    self.push(Value::Int(v))?;
                }
                b'J' => {
                    let v = self.number(4)? as u32 as i32;
                    self.push(Value::Int(v.into()))?;
                }
                b'K' | b'M' => {
                    let v = self.number(if op == b'K' { 1 } else { 2 })?;
                    self.push(Value::Int(v as i64))?;
                }
                0x8a => {
                    let n = self.number(1)?;
                    if n > 8 {
                        return Err(bad("a number of more than 64 bits"));
                    }
                    let raw = self.number(n)?;
                    let shift = 64 - 8 * n as u32;
                    self.push(Value::Int(if n == 0 {
                        0
                    } else {
                        ((raw << shift) as i64) >> shift
                    }))?;
                }
                b'G' => {
                    self.take(8)?; // a float: nothing that is read here is one
                    self.push(Value::None)?;
                }
                b'U' | b'C' | 0x8c => self.string(1)?,
                b'T' | b'B' | b'X' => self.string(4)?,
                0x8d | 0x8e | 0x96 => self.string(8)?,
                b'V' => {
                    let line = self.line()?;
                    self.push(Value::Bytes(line))?;
                }
                b'S' => {
                    let line = self.line()?;
                    let inner = line.strip_prefix(b"'").and_then(|l| l.strip_suffix(b"'"));
                    let inner = inner
                        .or_else(|| line.strip_prefix(b"\"").and_then(|l| l.strip_suffix(b"\"")));
                    match inner.filter(|l| !l.contains(&b'\\')) {
                        Some(text) => self.push(Value::Bytes(text))?,
                        None => {
                            return Err(bad(
                                "an escaped string of protocol 0: write it with protocol 2 or later",
                            ));
                        }
                    }
                }
                b']' => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::List(items))?;
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Dict(Vec::new()))?;
                    self.set_items(&items)?;
                }
                0x85..=0x87 => self.tuple(usize::from(op - 0x84))?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(&items)?;
                }
                b'p' => {
                    let key = self.text_number()?;
                    self.remember(u64::try_from(key).map_err(|_| bad("a negative memo"))?)?;
                }
                b'q' | b'r' => {
                    let key = self.number(if op == b'q' { 1 } else { 4 })?;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                b'g' => {
                    let key = self.text_number()?;
                    self.recall(u64::try_from(key).map_err(|_| bad("a negative memo"))?)?;
                }
                b'h' | b'j' => {
                    let key = self.number(if op == b'h' { 1 } else { 4 })?;
                    self.recall(key)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Bytes(name), Value::Bytes(module)) =
                        (&self.values[name], &self.values[module])
                    else {
                        return Err(bad("a name that is no string"));
                    };
                    let (name, module) = (*name, *module);
                    self.global(module, name)?;
                }
                b'R' => self.reduce()?,
                b'b' => {
                    let (new, to) = (self.pop()?, self.top()?);
                    match &mut self.values[to] {
                        Value::Call { state, .. } => *state = Some(new),
                        _ => return Err(bad("gives a state to something that has none")),
                    }
                }
                _ => {
                    return Err(bad(format!(
                        "operation 0x{op:02x} is not one that data archives use"
                    )));
                }
            }
        }
    }

    fn string(&mut self, length_bytes: u64) -> Result<()> {
        let n = self.number(length_bytes)?;
        let text = self.take(n)?;
        self.push(Value::Bytes(text))
    }

    fn global(&mut self, module: &[u8], name: &[u8]) -> Result<()> {
        let name = format!(
            "{}.{}",
            String::from_utf8_lossy(module),
            String::from_utf8_lossy(name)
        );
        self.push(Value::Global(name))
    }
}
