//! What CUDA kernels take of a multiprocessor: the flag and the columns that `bench` and `profile` share.

use clap::Args;
use tilewright::backend::Backend;
use tilewright::backend::cuda::{Footprint, Machine};
use tilewright::report::table::number;
use tilewright::{Error, Result};

/// The flag.
#[derive(Args)]
pub struct OccupancyFlag {
    /// Registers, shared and local memory and theoretical occupancy of CUDA kernels, compiled for the device's own
    /// architecture or for sm_N
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true)]
    occupancy: Option<Option<u32>>,
}

impl OccupancyFlag {
    /// Whether it stands on the command line.
    pub fn given(&self) -> bool {
        self.occupancy.is_some()
    }

    /// What is asked for on `backend`.
    ///
    /// # Errors
    /// It is not CUDA's.
    pub fn machine(&self, backend: &dyn Backend) -> Result<Option<Machine>> {
        match self.occupancy {
            Some(_) if !backend.name().starts_with("cuda") => Err(Error::input(format!(
                "--occupancy is of CUDA kernels, this is {}: --backend cuda or cuda:sim has them",
                backend.name()
            ))),
            Some(Some(arch)) => Ok(Some(Machine::Arch(arch))),
            Some(None) => Ok(Some(Machine::Own)),
            None => Ok(None),
        }
    }
}

/// Headings of [`cells`].
pub const HEADINGS: [&str; 4] = ["registers", "shared KiB", "local B", "occupancy %"];

/// Cells of a row; empty where nothing is known.
pub fn cells(footprint: Option<&Footprint>) -> [String; 4] {
    let Some(f) = footprint else {
        return Default::default();
    };
    [
        f.registers.to_string(),
        number(f64::from(f.shared) / 1024.0, 1),
        f.local.to_string(),
        f.occupancy
            .map_or(String::new(), |o| number(100.0 * o.share, 0)),
    ]
}
