//! NVRTC, CUDA's compiler as a library, loaded at run time.

use super::find::{NVRTC_NAMES, nvrtc_folders};
use crate::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;

type Program = *mut std::ffi::c_void;
type Sized = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The compiler.
pub struct Nvrtc {
    version: (u32, u32),
    path: PathBuf,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log: (Sized, Bytes),
    ptx: (Sized, Bytes),
    cubin: (Sized, Bytes),
    archs: Vec<u32>,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "NVRTC {} at {}",
            self.version_text(),
            self.path.display()
        )
    }
}

/// What is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// PTX for `compute_80`, ...: the simulator's language.
    Ptx(u32),
    /// Machine code for `sm_80`, ...
    Cubin(u32),
}

impl Target {
    /// The compiler's option.
    pub fn option(self) -> String {
        match self {
            Target::Ptx(arch) => format!("--gpu-architecture=compute_{arch}"),
            Target::Cubin(arch) => format!("--gpu-architecture=sm_{arch}"),
        }
    }
}

/// The library's error for people: what is missing and how to get it.
fn missing(tried: &[String]) -> Error {
    Error::input(format!(
        "NVRTC, CUDA's run-time compiler, is not here: looked for {} in the library path and in {}; `pip install \
         nvidia-cuda-nvrtc` gets it (no toolkit needed), TILEWRIGHT_NVRTC names another folder",
        NVRTC_NAMES.join(", "),
        match tried.is_empty() {
            true => "CUDA_HOME, Python's site-packages and /usr/local/cuda*".to_string(),
            false => tried.join(", "),
        }
    ))
}

fn open(path: &Path) -> Option<Library> {
    // NVRTC opens its builtins by name; one that is loaded already is found wherever it lies.
    for entry in path
        .parent()
        .and_then(|d| d.read_dir().ok())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("libnvrtc-builtins.so") {
            // SAFETY: NVIDIA's library has no initialiser that could misbehave.
            if let Ok(builtins) = unsafe { Library::new(entry.path()) } {
                std::mem::forget(builtins);
            }
        }
    }
    // SAFETY: as above.
    unsafe { Library::new(path) }.ok()
}

/// Where the loaded library that contains `symbol` lies.
#[cfg(unix)]
fn file_of(symbol: *const std::ffi::c_void) -> Option<PathBuf> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr only reads the address and fills `info`.
    let found = unsafe { libc::dladdr(symbol, info.as_mut_ptr()) };
    // SAFETY: zeroed or filled in by dladdr; the name is a C string that lives with the library.
    let info = unsafe { info.assume_init() };
    (found != 0 && !info.dli_fname.is_null()).then(|| {
        PathBuf::from(
            unsafe { CStr::from_ptr(info.dli_fname) }
                .to_string_lossy()
                .into_owned(),
        )
    })
}

#[cfg(not(unix))]
fn file_of(_symbol: *const std::ffi::c_void) -> Option<PathBuf> {
    None
}

impl Nvrtc {
    /// The compiler, loaded once.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not found: where it was looked for and how to get it.
    pub fn get() -> Result<&'static Nvrtc> {
        static LOADED: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        LOADED
            .get_or_init(|| Nvrtc::load().map_err(|e| e.to_string()))
            .as_ref()
            .map_err(|e| Error::input(e.clone()))
    }

    fn load() -> Result<Nvrtc> {
        let folders = nvrtc_folders();
        let in_folders = folders
            .iter()
            .flat_map(|f| NVRTC_NAMES.iter().map(move |n| f.join(n)))
            .filter(|p| p.exists());
        let by_name = NVRTC_NAMES.iter().map(PathBuf::from);
        // A folder that was named comes first, then the library path, then where packages put it.
        let candidates: Vec<PathBuf> = match std::env::var_os("TILEWRIGHT_NVRTC") {
            Some(_) => in_folders.chain(by_name).collect(),
            None => by_name.chain(in_folders).collect(),
        };
        for path in candidates {
            if let Some(library) = open(&path)
                && let Ok(nvrtc) = Nvrtc::bind(library, path)
            {
                return Ok(nvrtc);
            }
        }
        let tried: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        Err(missing(&tried))
    }

    fn bind(library: Library, path: PathBuf) -> Result<Nvrtc> {
        // Never unloaded: the function pointers stay good.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the types are those of nvrtc.h.
                *unsafe { library.get($name.as_bytes()) }
                    .map_err(|e| Error::run(format!("{}: {e}", path.display())))?
            };
        }
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
            symbol!("nvrtcVersion");
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two valid places.
        unsafe { version(&mut major, &mut minor) };
        let arch_count: unsafe extern "C" fn(*mut c_int) -> c_int =
            symbol!("nvrtcGetNumSupportedArchs");
        let arch_list: unsafe extern "C" fn(*mut c_int) -> c_int =
            symbol!("nvrtcGetSupportedArchs");
        let mut n = 0;
        // SAFETY: a valid place, then as many as NVRTC says that it fills.
        let archs = unsafe {
            arch_count(&mut n);
            let mut archs = vec![0; n as usize];
            arch_list(archs.as_mut_ptr());
            archs
        };
        Ok(Nvrtc {
            version: (major as u32, minor as u32),
            error_string: symbol!("nvrtcGetErrorString"),
            create: symbol!("nvrtcCreateProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            destroy: symbol!("nvrtcDestroyProgram"),
            log: (
                symbol!("nvrtcGetProgramLogSize"),
                symbol!("nvrtcGetProgramLog"),
            ),
            ptx: (symbol!("nvrtcGetPTXSize"), symbol!("nvrtcGetPTX")),
            cubin: (symbol!("nvrtcGetCUBINSize"), symbol!("nvrtcGetCUBIN")),
            archs: archs.into_iter().map(|a| a as u32).collect(),
            path: file_of(version as *const _).unwrap_or(path),
        })
    }

    /// What to compile for a device of compute capability `arch`: its machine code, or where this NVRTC is older than the
    /// device, the newest PTX that it knows, which the driver translates.
    pub fn target(&self, arch: u32) -> Target {
        let older = self.archs.iter().filter(|&&a| a < arch).max();
        match (self.archs.contains(&arch), older) {
            (false, Some(&newest)) => Target::Ptx(newest),
            _ => Target::Cubin(arch),
        }
    }

    /// The version, in the driver's notation: 13000 is 13.0.
    pub fn version(&self) -> i32 {
        (1000 * self.version.0 + 10 * self.version.1) as i32
    }

    /// `13.0`.
    pub fn version_text(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// The library's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles `files` (the first is the source, the others are what it includes, by name).
    ///
    /// # Errors
    /// [`Error::Run`] with the compiler's messages, which name file and line.
    pub fn compile(
        &self,
        files: &[(String, impl AsRef<str>)],
        options: &[String],
        target: Target,
    ) -> Result<Vec<u8>> {
        let c =
            |s: &str| CString::new(s).map_err(|_| Error::run("a kernel source holds a zero byte"));
        let (names, texts): (Vec<CString>, Vec<CString>) = files
            .iter()
            .map(|(n, t)| Ok((c(n)?, c(t.as_ref())?)))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let pointers = |s: &[CString]| s.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (name_ptrs, text_ptrs) = (pointers(&names), pointers(&texts));
        let mut program = ProgramGuard {
            program: null_mut(),
            nvrtc: self,
        };
        // SAFETY: all strings live through the call; counts are those of the lists.
        let status = unsafe {
            (self.create)(
                &mut program.program,
                text_ptrs[0],
                name_ptrs[0],
                files.len() as c_int - 1,
                text_ptrs[1..].as_ptr(),
                name_ptrs[1..].as_ptr(),
            )
        };
        self.check(status)?;
        let all = options.iter().cloned().chain([target.option()]);
        let options = all.map(|o| c(&o)).collect::<Result<Vec<_>>>()?;
        let option_ptrs = pointers(&options);
        // SAFETY: the program was created; the options live through the call.
        let status = unsafe {
            (self.compile)(
                program.program,
                option_ptrs.len() as c_int,
                option_ptrs.as_ptr(),
            )
        };
        if status != 0 {
            let log = self.fetch(program.program, self.log)?;
            let log = String::from_utf8_lossy(&log);
            let options: Vec<String> = options
                .iter()
                .map(|o| o.to_string_lossy().into_owned())
                .collect();
            return Err(Error::run(format!(
                "{} does not compile ({}):\n{}",
                files[0].0,
                options.join(" "),
                log.trim_matches(['\0', '\n', ' '])
            )));
        }
        self.fetch(
            program.program,
            match target {
                Target::Ptx(_) => self.ptx,
                Target::Cubin(_) => self.cubin,
            },
        )
    }

    fn fetch(&self, program: Program, (size, bytes): (Sized, Bytes)) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: a live program, and a buffer of the size it asks for.
        self.check(unsafe { size(program, &mut n) })?;
        let mut out = vec![0u8; n];
        self.check(unsafe { bytes(program, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }

    fn check(&self, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC returns a static string for every code.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(Error::run(format!("NVRTC: {}", text.to_string_lossy())))
    }
}

struct ProgramGuard<'a> {
    program: Program,
    nvrtc: &'a Nvrtc,
}

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created once, destroyed once.
            unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// NVRTC, or `None` with the reason printed where a machine does not have it (CI must).
    pub(crate) fn present() -> Option<&'static Nvrtc> {
        match Nvrtc::get() {
            Ok(nvrtc) => Some(nvrtc),
            Err(e) => {
                assert!(std::env::var("CI").is_err(), "{e}");
                println!("skipped: {e}");
                None
            }
        }
    }

    #[test]
    fn errors_name_file_and_line() {
        let Some(nvrtc) = present() else { return };
        let files = [
            ("t.cu".to_string(), "#include \"common/u.cuh\"\n"),
            (
                "common/u.cuh".to_string(),
                "\n__device__ int f() { return x; }\n",
            ),
        ];
        let e = nvrtc.compile(&files, &[], Target::Ptx(80)).unwrap_err();
        assert!(e.to_string().contains("common/u.cuh(2): error"), "{e}");
    }

    #[test]
    fn a_device_newer_than_the_compiler_gets_ptx() {
        let Some(nvrtc) = present() else { return };
        assert_eq!(nvrtc.target(80), Target::Cubin(80));
        assert!(matches!(nvrtc.target(990), Target::Ptx(a) if a >= 90));
        // Older than all: the compiler's own message says so.
        assert_eq!(nvrtc.target(30), Target::Cubin(30));
    }

    #[test]
    fn ptx_and_machine_code() {
        let Some(nvrtc) = present() else { return };
        let text = "extern \"C\" __global__ void f(float* x) { x[threadIdx.x] = N; }";
        let files = [("t.cu".to_string(), text)];
        let options = ["-DN=3".to_string()];
        let ptx = nvrtc.compile(&files, &options, Target::Ptx(80)).unwrap();
        assert!(String::from_utf8_lossy(&ptx).contains(".entry f("));
        let cubin = nvrtc.compile(&files, &options, Target::Cubin(90)).unwrap();
        assert_eq!(cubin[..4], *b"\x7fELF");
    }
}
