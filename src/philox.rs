//! Philox4x32-10, a counter-based random number generator (Salmon et al. 2011, "Parallel Random Numbers: As Easy as
//! 1, 2, 3"): a number is a function of its key and its counter, so every backend draws the same ones in any order.

/// Ten rounds: four 32-bit words from a counter and a key.
#[inline(always)]
pub fn philox4x32(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [
            (b >> 32) as u32 ^ c[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ c[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

/// A uniform number in [0, 1) with 24 bits, from the high bits of `word`.
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// A sequence of numbers on the host, keyed by seed and stream.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
    block: u64,
    words: [u32; 4],
    used: usize,
    spare: Option<f32>,
}

impl Philox {
    /// Sequence `stream` of `seed`.
    pub fn new(seed: u64, stream: u32) -> Self {
        Self::with(seed, [stream, 0])
    }

    /// The sequence of a pair, such as (epoch, sample).
    pub fn with(seed: u64, stream: [u32; 2]) -> Self {
        Philox {
            key: [seed as u32, (seed >> 32) as u32],
            stream,
            block: 0,
            words: [0; 4],
            used: 4,
            spare: None,
        }
    }

    /// The next 32 bits.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            let counter = [
                self.block as u32,
                (self.block >> 32) as u32,
                self.stream[0],
                self.stream[1],
            ];
            self.words = philox4x32(counter, self.key);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        unit(self.word())
    }

    /// Uniform in `0..n` (Lemire's multiply-shift; its bias is below n / 2^32).
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.word()) * u64::from(n)) >> 32) as u32
    }

    /// Standard normal (Box & Muller 1958).
    pub fn normal(&mut self) -> f32 {
        if let Some(v) = self.spare.take() {
            return v;
        }
        let u = (f64::from(self.word()) + 1.0) / 4_294_967_296.0;
        let a = f64::from(self.word()) / 4_294_967_296.0 * std::f64::consts::TAU;
        let r = (-2.0 * u.ln()).sqrt();
        self.spare = Some((r * a.sin()) as f32);
        (r * a.cos()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        // kat_vectors of the Random123 distribution, "philox4x32 10".
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut r = Philox::new(7, 3);
        let v: Vec<f64> = (0..100_000).map(|_| f64::from(r.normal())).collect();
        let mean = v.iter().sum::<f64>() / 1e5;
        let var = v.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 1e5;
        assert!(
            mean.abs() < 0.02 && (var - 1.0).abs() < 0.02,
            "{mean} {var}"
        );
    }
}
