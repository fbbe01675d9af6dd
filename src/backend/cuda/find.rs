//! Where CUDA's libraries are looked for.

use std::path::{Path, PathBuf};

/// Names of NVRTC, newest first.
#[cfg(not(windows))]
pub const NVRTC_NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Names of NVRTC, newest first.
#[cfg(windows)]
pub const NVRTC_NAMES: &[&str] = &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];

/// Folders that may hold NVRTC, in the order of search: `TILEWRIGHT_NVRTC`, CUDA_HOME and CUDA_PATH, Python's
/// site-packages (`pip install nvidia-cuda-nvrtc`), the toolkit's usual folders.
pub fn nvrtc_folders() -> Vec<PathBuf> {
    let mut folders = vec![];
    if let Some(dir) = std::env::var_os("TILEWRIGHT_NVRTC") {
        let dir = PathBuf::from(dir);
        folders.extend(packages(&dir));
        folders.push(dir);
    }
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(home) {
            folders.extend(toolkit(Path::new(&home)));
        }
    }
    for site in site_packages() {
        folders.extend(packages(&site));
    }
    let mut roots = vec![PathBuf::from("/usr/local/cuda"), PathBuf::from("/opt/cuda")];
    roots.extend(children(Path::new("/usr/local"), "cuda-"));
    for root in roots {
        folders.extend(toolkit(&root));
    }
    folders.retain(|f| f.is_dir());
    folders
}

/// Folders that may hold NVTX: the toolkit's, and those of Python's packages (`pip install nvidia-nvtx`).
pub fn nvtx_folders() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter();
    let homes = homes.filter_map(std::env::var_os).map(PathBuf::from);
    let mut folders: Vec<PathBuf> = homes.flat_map(|h| toolkit(&h)).collect();
    for site in site_packages() {
        folders.extend(["cu13", "nvtx"].map(|p| site.join("nvidia").join(p).join("lib")));
    }
    folders.extend(toolkit(Path::new("/usr/local/cuda")));
    folders.retain(|f| f.is_dir());
    folders
}

fn toolkit(home: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "bin", "bin/x64"]
        .map(|d| home.join(d))
        .to_vec()
}

/// Where NVIDIA's Python packages put NVRTC under a site-packages folder.
fn packages(site: &Path) -> Vec<PathBuf> {
    ["cu13", "cuda_nvrtc"]
        .iter()
        .flat_map(|p| ["lib", "bin", "bin/x86_64"].map(|d| site.join("nvidia").join(p).join(d)))
        .collect()
}

fn site_packages() -> Vec<PathBuf> {
    let mut sites = vec![];
    if let Some(path) = std::env::var_os("PYTHONPATH") {
        sites.extend(std::env::split_paths(&path));
    }
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .collect();
    prefixes.extend([".venv", "venv"].map(PathBuf::from));
    // Every Python on the path is PREFIX/bin/python3.
    let path = std::env::var_os("PATH").unwrap_or_default();
    for dir in std::env::split_paths(&path) {
        if ["python3", "python", "python.exe"]
            .iter()
            .any(|p| dir.join(p).exists())
        {
            prefixes.extend(dir.parent().map(Path::to_path_buf));
            prefixes.push(dir);
        }
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    if let Some(home) = &home {
        prefixes.push(home.join(".local"));
        // pyenv puts scripts on the path, not the Pythons.
        prefixes.extend(children(&home.join(".pyenv/versions"), ""));
    }
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for prefix in prefixes {
        for lib in ["lib", "lib64"] {
            for python in children(&prefix.join(lib), "python3") {
                sites.push(python.join("site-packages"));
                sites.push(python.join("dist-packages"));
            }
        }
        sites.push(prefix.join("Lib").join("site-packages"));
    }
    sites.retain(|s| s.is_dir());
    sites
}

/// Entries of `dir` whose name begins with `start`, sorted, the last first: newer versions before older.
fn children(dir: &Path, start: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(start))
        .map(|e| e.path())
        .collect();
    found.sort();
    found.reverse();
    found
}
