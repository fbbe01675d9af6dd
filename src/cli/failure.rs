//! Every end that is not a good one: bad usage in two lines, and a defect of the program itself in one.

use super::output::{SHOWN, leave, note};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;

/// What the last panic outside this program's own code said, for when it reaches [`guard`].
static LAST: Mutex<String> = Mutex::new(String::new());

fn describe(info: &PanicHookInfo) -> String {
    let what = info.payload();
    let what = what
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| what.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    let at = info.location().map(ToString::to_string).unwrap_or_default();
    format!("{what} ({at})").replace('\n', " ")
}

fn report(what: &str) {
    SHOWN.end();
    note(&format!(
        "internal error: {what}; please report this with the command that led to it"
    ));
}

/// Runs the program; a panic becomes one line and exit status 1.
///
/// A panic in this program's own code ends the process where it happens, since a thread that others wait for may have
/// died. One in a dependency may be caught yet (image codecs on corrupt data are), and counts when it arrives here.
pub fn guard(program: impl FnOnce() -> ExitCode) -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let own = info
            .location()
            .is_some_and(|l| l.file().starts_with("src/"));
        if own {
            report(&describe(info));
            leave(1);
        }
        *LAST.lock().unwrap_or_else(|e| e.into_inner()) = describe(info);
    }));
    catch_unwind(AssertUnwindSafe(program)).unwrap_or_else(|_| {
        report(&LAST.lock().unwrap_or_else(|e| e.into_inner()));
        ExitCode::from(1)
    })
}

/// Help and version as they are; any other message of the flag parser in two or three lines.
pub fn usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        // Nobody reads the help to its end through a closed pipe.
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return ExitCode::from(2);
    }
    for paragraph in e.render().to_string().split("\n\n") {
        let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if !line.starts_with("For more information") && !line.is_empty() {
            note(&line);
        }
    }
    ExitCode::from(2)
}
