//! Philox streams of the data path: one per use, so that no two uses under one seed share numbers.

use crate::philox::Philox;

/// What a stream is for.
#[derive(Clone, Copy)]
pub(crate) enum Use {
    /// Order of the samples: (epoch, 0).
    Shuffle = 1,
    /// Geometry of a sample: (epoch, sample).
    Augment = 2,
    /// Splits and subsets: (kind of view, class).
    Split = 3,
    /// Synthetic images: (class, image).
    Synthetic = 4,
    /// Mixing of the samples of a batch: (epoch, batch).
    Mix = 5,
    /// Order of images in shards: (epoch, 1) when they are read, (0, 0) when they are written.
    Shards = 6,
}

/// The stream for `purpose`, told apart by `a` and `b`.
pub(crate) fn stream(seed: u64, purpose: Use, a: u32, b: u32) -> Philox {
    // The purpose goes into the key's top byte, where a seed that a person types has zeros.
    Philox::with(seed ^ ((purpose as u64) << 56), [a, b])
}

/// Fisher-Yates.
pub(crate) fn shuffle(items: &mut [u32], random: &mut Philox) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.below(i as u32 + 1) as usize);
    }
}
