//! The CUDA C++ sources and what they include.

use crate::Result;
use crate::backend::source::SourceFolder;
use std::borrow::Cow;

/// `kernels/`, or a folder in its place.
#[derive(Clone, Debug)]
pub struct KernelSource(pub SourceFolder);

impl Default for KernelSource {
    fn default() -> Self {
        KernelSource(SourceFolder::cuda())
    }
}

impl KernelSource {
    /// `name` and, after it, every file that it includes with quotes, directly or not: (name, text) of each, once.
    ///
    /// # Errors
    /// As [`SourceFolder::read`].
    pub fn with_includes(&self, name: &str) -> Result<Vec<(String, Cow<'static, str>)>> {
        let mut files: Vec<(String, Cow<'static, str>)> = vec![];
        let mut wanted = vec![name.to_string()];
        while let Some(name) = wanted.pop() {
            if files.iter().any(|f| f.0 == name) {
                continue;
            }
            let text = self.0.read(&name)?;
            for line in text.lines() {
                let file = line.trim().strip_prefix("#include \"");
                if let Some(file) = file.and_then(|f| f.split('"').next()) {
                    wanted.push(file.to_string());
                }
            }
            files.push((name, text));
        }
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_includes_is_found() {
        let source = KernelSource::default();
        let names = source.0.names();
        for name in &names {
            source.with_includes(name).unwrap();
        }
        assert!(names.contains(&"conv2d.cu"));
        let files = source.with_includes("conv2d.cu").unwrap();
        assert!(files.iter().any(|f| f.0 == "common/gemm_core.cuh"));
    }
}
