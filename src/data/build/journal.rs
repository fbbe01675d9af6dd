//! What a shard under way holds so far, on disk: a record for each candidate that is settled, in the order in which they
//! were. A process that is killed loses what it was downloading, no more: a torn record at the end is cut off.

use crate::{Error, Result};
use flate2::Crc;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: u32 = 0x5457_4A31;
/// Magic, slot, bytes of the description, bytes of the image, checksum of all that.
const HEAD: usize = 20;

/// A record: its description, and the image where there is one.
pub(super) struct Record {
    pub about: Vec<u8>,
    pub image: Vec<u8>,
}

pub(super) struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    /// Where the record of each slot is: first byte, description, image.
    places: HashMap<u32, (u64, u32, u32)>,
}

impl Journal {
    /// Opens the journal at `path`, with what an earlier process left in it.
    pub(super) fn open(path: &Path) -> Result<Journal> {
        let fail = |e| Error::writing(path, e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail)?;
        let (mut end, mut places) = (0, HashMap::new());
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        let mut head = [0; HEAD];
        let mut body = vec![];
        // Whatever is not a whole record ends it.
        while reader.read_exact(&mut head).is_ok() {
            let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|k| head[4 * i + k]));
            let (about, image) = (word(2), word(3));
            body.clear();
            let len = u64::from(about) + u64::from(image);
            let read = reader.by_ref().take(len).read_to_end(&mut body);
            let whole = read.is_ok_and(|n| n as u64 == len);
            if word(0) != MAGIC || !whole || checksum(&head[..16], &body, &[]) != word(4) {
                break;
            }
            places.insert(word(1), (end, about, image));
            end += HEAD as u64 + len;
        }
        drop(reader);
        file.set_len(end).map_err(fail)?;
        Ok(Journal {
            path: path.to_path_buf(),
            file,
            end,
            places,
        })
    }

    pub(super) fn has(&self, slot: u32) -> bool {
        self.places.contains_key(&slot)
    }

    /// Adds a record.
    pub(super) fn add(&mut self, slot: u32, record: &Record) -> Result<()> {
        let (about, image) = (record.about.len() as u32, record.image.len() as u32);
        let mut bytes = Vec::with_capacity(HEAD + (about + image) as usize);
        for word in [MAGIC, slot, about, image] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(checksum(&bytes, &record.about, &record.image).to_le_bytes());
        bytes.extend(&record.about);
        bytes.extend(&record.image);
        let fail = |e| Error::writing(&self.path, e);
        self.file.seek(SeekFrom::Start(self.end)).map_err(fail)?;
        self.file.write_all(&bytes).map_err(fail)?;
        self.places.insert(slot, (self.end, about, image));
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// The record of a slot.
    pub(super) fn get(&mut self, slot: u32) -> Result<Option<Record>> {
        let Some(&(at, about, image)) = self.places.get(&slot) else {
            return Ok(None);
        };
        let fail = |e| Error::writing(&self.path, e);
        let mut bytes = vec![0; (about + image) as usize];
        self.file
            .seek(SeekFrom::Start(at + HEAD as u64))
            .map_err(fail)?;
        self.file.read_exact(&mut bytes).map_err(fail)?;
        let image = bytes.split_off(about as usize);
        Ok(Some(Record {
            about: bytes,
            image,
        }))
    }
}

fn checksum(head: &[u8], about: &[u8], image: &[u8]) -> u32 {
    let mut crc = Crc::new();
    [head, about, image].iter().for_each(|b| crc.update(b));
    crc.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_tail_is_cut_off_and_the_rest_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let record = |text: &str, image: &[u8]| Record {
            about: text.into(),
            image: image.into(),
        };
        let mut j = Journal::open(&path).unwrap();
        j.add(7, &record("seven", &[1, 2, 3])).unwrap();
        let whole = std::fs::metadata(&path).unwrap().len();
        j.add(2, &record("two", &[9; 100])).unwrap();
        drop(j);
        let bytes = std::fs::read(&path).unwrap();
        let mut flipped = bytes.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for torn in [
            &bytes[..bytes.len() - 1],
            &bytes[..whole as usize + 3],
            &flipped,
        ] {
            std::fs::write(&path, torn).unwrap();
            let mut j = Journal::open(&path).unwrap();
            assert!(j.has(7) && !j.has(2));
            assert_eq!(std::fs::metadata(&path).unwrap().len(), whole);
            j.add(2, &record("again", &[])).unwrap();
            let two = j.get(2).unwrap().unwrap();
            assert_eq!((two.about, two.image), (b"again".to_vec(), vec![]));
            let seven = j.get(7).unwrap().unwrap();
            assert_eq!(
                (seven.about, seven.image),
                (b"seven".to_vec(), vec![1, 2, 3])
            );
            assert!(j.get(1).unwrap().is_none());
        }
    }
}
