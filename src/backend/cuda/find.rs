//! Where CUDA's libraries are looked for.

use libloading::Library;
use std::path::{Path, PathBuf};

/// Names of NVRTC, newest first.
#[cfg(not(windows))]
pub const NVRTC_NAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Names of NVRTC, newest first.
#[cfg(windows)]
pub const NVRTC_NAMES: &[&str] = &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];

/// Folders that may hold NVRTC, in the order of search: `TILEWRIGHT_NVRTC`, then [`folders`].
pub fn nvrtc_folders() -> Vec<PathBuf> {
    const PACKAGES: &[&str] = &["cu13", "cuda_nvrtc"];
    let mut found = vec![];
    if let Some(dir) = std::env::var_os("TILEWRIGHT_NVRTC") {
        let dir = PathBuf::from(dir);
        found.extend(packages(&dir, PACKAGES));
        found.push(dir);
    }
    found.retain(|f| f.is_dir());
    found.extend(folders(PACKAGES));
    found
}

/// Folders that may hold a library of CUDA's, in the order of search: CUDA_HOME and CUDA_PATH, Python's site-packages
/// (`names`: folders of packages under `nvidia/` there), the toolkit's usual folders.
pub fn folders(names: &[&str]) -> Vec<PathBuf> {
    let mut folders = vec![];
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(home) {
            folders.extend(toolkit(Path::new(&home)));
        }
    }
    for site in site_packages() {
        folders.extend(packages(&site, names));
    }
    let mut roots = vec![PathBuf::from("/usr/local/cuda"), PathBuf::from("/opt/cuda")];
    roots.extend(children(Path::new("/usr/local"), "cuda-"));
    for root in roots {
        folders.extend(toolkit(&root));
    }
    folders.retain(|f| f.is_dir());
    folders
}

/// The first of `names` that loads, by the library path or from one of `folders`. It stays loaded.
pub fn load(names: &[&str], folders: &[PathBuf]) -> Option<&'static Library> {
    let by_name = names.iter().map(PathBuf::from);
    let in_folders = folders
        .iter()
        .flat_map(|f| names.iter().map(move |n| f.join(n)));
    // SAFETY: NVIDIA's libraries have no initialisers that could misbehave.
    let library = by_name
        .chain(in_folders)
        .find_map(|path| unsafe { Library::new(path).ok() })?;
    Some(Box::leak(Box::new(library)))
}

fn toolkit(home: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "bin", "bin/x64"]
        .map(|d| home.join(d))
        .to_vec()
}

/// Where NVIDIA's Python packages put libraries under a site-packages folder.
fn packages(site: &Path, names: &[&str]) -> Vec<PathBuf> {
    names
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
