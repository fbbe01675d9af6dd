//! PTX text to tokens, each with its line.

use crate::error::{Error, Result};

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub enum Tok {
    /// A name, an opcode with its modifiers, a directive, a special register or a number: `ld.global.f32`, `%tid.x`.
    Word(String),
    /// A quoted string, without its quotes.
    Str(String),
    /// A single character of punctuation.
    P(char),
}

/// A token and the line it stands on, counted from 1.
#[derive(Clone, Debug)]
pub struct Token {
    pub tok: Tok,
    pub line: u32,
}

fn word_char(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// Splits PTX into tokens; comments and white space go.
///
/// # Errors
/// A character that PTX does not have, or an open comment or string.
pub fn lex(text: &str) -> Result<Vec<Token>> {
    let s = text.as_bytes();
    let mut out = Vec::with_capacity(s.len() / 4);
    let (mut i, mut line) = (0, 1u32);
    while i < s.len() {
        let c = s[i];
        match c {
            b'\n' => {
                line += 1;
                i += 1;
            }
            b' ' | b'\t' | b'\r' | 0 => i += 1,
            b'/' if s.get(i + 1) == Some(&b'/') => {
                while i < s.len() && s[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if s.get(i + 1) == Some(&b'*') => {
                let start = line;
                i += 2;
                loop {
                    match s.get(i) {
                        None => {
                            return Err(Error::input(format!(
                                "PTX line {start}: a comment is not closed"
                            )));
                        }
                        Some(b'*') if s.get(i + 1) == Some(&b'/') => break,
                        Some(b'\n') => line += 1,
                        Some(_) => {}
                    }
                    i += 1;
                }
                i += 2;
            }
            b'"' => {
                let start = i + 1;
                i = start;
                while i < s.len() && s[i] != b'"' && s[i] != b'\n' {
                    i += if s[i] == b'\\' { 2 } else { 1 };
                }
                if s.get(i) != Some(&b'"') {
                    return Err(Error::input(format!(
                        "PTX line {line}: a string is not closed"
                    )));
                }
                out.push(Token {
                    tok: Tok::Str(String::from_utf8_lossy(&s[start..i]).into_owned()),
                    line,
                });
                i += 1;
            }
            _ if word_char(c) => {
                let start = i;
                while i < s.len() {
                    if word_char(s[i]) {
                        i += 1;
                    } else if s[i] == b':' && s.get(i + 1) == Some(&b':') {
                        i += 2; // `.L2::cache_hint`
                    } else {
                        break;
                    }
                }
                out.push(Token {
                    tok: Tok::Word(text[start..i].to_string()),
                    line,
                });
            }
            b'{' | b'}' | b'(' | b')' | b'[' | b']' | b'<' | b'>' | b',' | b';' | b':' | b'='
            | b'@' | b'!' | b'|' | b'+' | b'-' | b'~' => {
                out.push(Token {
                    tok: Tok::P(c as char),
                    line,
                });
                i += 1;
            }
            _ => {
                return Err(Error::input(format!(
                    "PTX line {line}: unexpected character '{}'",
                    text[i..].chars().next().unwrap_or('?')
                )));
            }
        }
    }
    Ok(out)
}
