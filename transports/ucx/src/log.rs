//! UCX's own log goes to standard error. By itself it goes to standard output, among what programs print there for others to read.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use ucx_sys::libloading::os::unix::Library;

/// Where a user sends it instead; then it is left alone.
const VARIABLE: &str = "UCX_LOG_FILE";
/// Bytes of a line, as UCX cuts them by default.
const LINE_BYTES_MAX: usize = 1024;
/// `UCS_LOG_FUNC_RC_STOP`: no other handler gets the line.
const STOP: c_int = 0;
/// Names of `ucs_log_level_t`, as UCX writes them (`src/ucs/config/types.h`, the same from 1.13 to 1.22).
const LEVELS: [&str; 12] =
    ["FATAL", "ERROR", "WARN", "DIAG", "INFO", "DEBUG", "TRACE", "REQ", "DATA", "ASYNC", "FUNC", "POLL"];

/// `ucs_log_func_t`. The last is a `va_list`: an array on x86-64 and a structure of 32 bytes on 64-bit Arm, which both pass by its address.
type Handler = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    *const c_char,
    c_int,
    *const c_void,
    *const c_char,
    *mut c_void,
) -> c_int;

unsafe extern "C" {
    /// As in `stdio.h`.
    fn vsnprintf(to: *mut c_char, bytes: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// Has a UCX that was just loaded write to standard error. One without such handlers is left alone.
pub(crate) fn redirect(library: &Library) {
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) || std::env::var_os(VARIABLE).is_some() {
        return;
    }
    // SAFETY: the function has had this type since it came about; it is found through the library that UCX's parts were loaded with.
    let push = unsafe { library.get::<unsafe extern "C" fn(Handler)>(b"ucs_log_push_handler\0") };
    if let Ok(push) = push {
        // SAFETY: called once for this library, which stays loaded, as the handler does.
        unsafe { push(handle) };
    }
}

/// Writes one message as UCX would.
unsafe extern "C" fn handle(
    file: *const c_char,
    line: c_uint,
    _function: *const c_char,
    level: c_int,
    _component: *const c_void,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_int {
    let mut text = [0_u8; LINE_BYTES_MAX];
    // SAFETY: UCX's own format with its arguments; no more is written than there is room for, and an end mark.
    unsafe { vsnprintf(text.as_mut_ptr().cast(), text.len(), format, arguments) };
    let text = CStr::from_bytes_until_nul(&text).map(CStr::to_string_lossy).unwrap_or_default();
    let file = if file.is_null() {
        "".into()
    } else {
        // SAFETY: a C string of UCX's, the name of its source.
        unsafe { CStr::from_ptr(file) }.to_string_lossy()
    };
    let source = Source { file: &file, line, level, at: SystemTime::now() };
    // Nothing can be done about a closed output, and nothing may unwind into UCX.
    let _ = std::io::stderr().lock().write_all(source.lines(&text).as_bytes());
    STOP
}

/// Where a message comes from.
struct Source<'a> {
    file: &'a str,
    line: u32,
    level: i32,
    at: SystemTime,
}

impl Source<'_> {
    /// A message in lines of UCX's form (`UCS_LOG_FMT`), which `doctor --log` reads.
    fn lines(&self, text: &str) -> String {
        let since = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let host = host();
        let file = Path::new(self.file).file_name().unwrap_or_default().to_string_lossy();
        let level = usize::try_from(self.level).ok().and_then(|level| LEVELS.get(level)).unwrap_or(&"PRINT");
        let (seconds, micros, process) = (since.as_secs(), since.subsec_micros(), std::process::id());
        let line = |text| {
            format!(
                "[{seconds}.{micros:06}] [{host}:{process:<5}:0] {file:>16}:{:<4} UCX  {level:<5} {text}\n",
                self.line
            )
        };
        text.lines().map(line).collect()
    }
}

/// This host's name, up to its first dot.
fn host() -> &'static str {
    static HOST: OnceLock<String> = OnceLock::new();
    HOST.get_or_init(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        name.trim().split('.').next().unwrap_or_default().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_is_of_the_form_that_ucx_gives_it() {
        let at = UNIX_EPOCH + Duration::from_micros(1_795_840_619_000_619);
        let source = Source { file: "src/uct/tcp/tcp_cm.c", line: 758, level: 1, at };
        let (host, process) = (host(), std::process::id());
        let head = format!("[1795840619.000619] [{host}:{process:<5}:0]         tcp_cm.c:758  UCX  ERROR ");
        assert_eq!(source.lines("it failed"), format!("{head}it failed\n"));
        assert_eq!(source.lines("one\ntwo"), format!("{head}one\n{head}two\n"));
        let odd = Source { level: -7, ..source };
        assert!(odd.lines("it failed").contains(" PRINT it failed"));
    }
}
