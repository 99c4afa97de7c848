//! UCX's own log goes to standard error. By itself it goes to standard output, among what programs print there for others to read.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::{self, Write as _};
use std::io::Write;
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

/// This host's name in every line, known before the first.
static HOST: OnceLock<String> = OnceLock::new();

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
        HOST.get_or_init(host);
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
    let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
    let file = if file.is_null() {
        c""
    } else {
        // SAFETY: a C string of UCX's, the name of its source.
        unsafe { CStr::from_ptr(file) }
    };
    let source = Source { file: file.to_bytes(), line, level, at: SystemTime::now() };
    for part in text.to_bytes().split(|byte| *byte == b'\n') {
        // Nothing can be done about a closed output, and nothing may unwind into UCX.
        let _ = std::io::stderr().lock().write_all(source.line(part).bytes());
    }
    STOP
}

/// Where a message comes from.
struct Source<'a> {
    file: &'a [u8],
    line: u32,
    level: i32,
    at: SystemTime,
}

impl Source<'_> {
    /// A line of UCX's form (`UCS_LOG_FMT`), which `doctor --log` reads.
    fn line(&self, text: &[u8]) -> Line {
        let since = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (seconds, micros, process) = (since.as_secs(), since.subsec_micros(), std::process::id());
        let file = self.file.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let file = std::str::from_utf8(file).unwrap_or_default();
        let level = usize::try_from(self.level).ok().and_then(|level| LEVELS.get(level)).unwrap_or(&"PRINT");
        let (host, number) = (HOST.get().map_or("", String::as_str), self.line);
        let mut line = Line { bytes: [0; 2 * LINE_BYTES_MAX], length: 0 };
        // It takes all that there is room for.
        let _ = write!(line, "[{seconds}.{micros:06}] [{host}:{process:<5}:0] {file:>16}:{number:<4} UCX  {level:<5} ");
        line.put(text);
        line.put(b"\n");
        line
    }
}

/// One line. Nothing is allocated for it: UCX may speak in the middle of an allocation, which it watches.
struct Line {
    bytes: [u8; 2 * LINE_BYTES_MAX],
    length: usize,
}

impl Line {
    fn put(&mut self, text: &[u8]) {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let taken = text.len().min(room.len());
        for (to, from) in room.iter_mut().zip(text) {
            *to = *from;
        }
        self.length += taken;
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes());
        Ok(())
    }
}

/// This host's name, up to its first dot.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().split('.').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_is_of_the_form_that_ucx_gives_it() {
        let at = UNIX_EPOCH + Duration::from_micros(1_795_840_619_000_619);
        let source = Source { file: b"src/uct/tcp/tcp_cm.c", line: 758, level: 1, at };
        let (host, process) = (HOST.get_or_init(host), std::process::id());
        let head = format!("[1795840619.000619] [{host}:{process:<5}:0]         tcp_cm.c:758  UCX  ERROR ");
        let said = |source: &Source<'_>, text: &[u8]| String::from_utf8(source.line(text).bytes().to_vec()).unwrap();
        assert_eq!(said(&source, b"it failed"), format!("{head}it failed\n"));
        let odd = Source { level: -7, ..source };
        assert!(said(&odd, b"it failed").contains(" PRINT it failed"));
        // A line that is too long is cut.
        assert_eq!(source.line(&[b'x'; 9000]).bytes().len(), 2 * LINE_BYTES_MAX);
    }
}
