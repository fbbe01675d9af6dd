//! The terminal view of `lab`: the loop in a thread of its own, keys and the picture in this one.

use super::super::output::{SHOWN, leave};
use super::app::{Act, App};
use super::draw::draw;
use super::probe::Probe;
use super::watch::{Event, watch};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event as Input};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use std::io::{IsTerminal, Stdout};
use std::process::ExitCode;
use std::sync::mpsc::{TryRecvError, channel};
use std::time::Duration;
use tilewright::{Error, Result};

/// How long a key waits at most for what the loop tells: nobody sees less.
const TICK: Duration = Duration::from_millis(30);
/// The picture's clock while the loop is busy: seldom, so as not to disturb what is measured.
const CLOCK: Duration = Duration::from_millis(120);

/// Whether there is somebody to look and to press keys.
pub fn possible() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
    std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && !dumb
}

/// The terminal as a screen; put back when dropped, and by [`leave`] and a panic.
struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

fn failed(e: std::io::Error) -> Error {
    Error::run(format!("the terminal: {e}; `--lines` does without it"))
}

impl Screen {
    fn open() -> Result<Screen> {
        let terminal = Terminal::new(CrosstermBackend::new(std::io::stdout()));
        let screen = Screen {
            terminal: terminal.map_err(failed)?,
        };
        // From here on the drop puts everything back.
        SHOWN.begin();
        enable_raw_mode().map_err(failed)?;
        execute!(std::io::stdout(), EnterAlternateScreen).map_err(failed)?;
        Ok(screen)
    }

    fn draw(&mut self, app: &mut App) -> Result<()> {
        self.terminal.draw(|f| draw(f, app)).map_err(failed)?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        SHOWN.end();
    }
}

/// Shows the loop's events and takes keys until one of them ends it.
pub fn run(probe: Probe, saves: Option<usize>) -> Result<ExitCode> {
    let mut app = App::new(&probe);
    let (tell, told) = channel::<Event>();
    let (order, orders) = channel();
    let mut screen = Screen::open()?;
    let worker = std::thread::spawn(move || {
        // Told to nobody, the screen is gone and so is the program.
        let mut tell = |e| tell.send(e).map_err(|_| Error::run("the screen is gone"));
        watch(probe, saves, &orders, &mut tell)
    });
    let mut clock = std::time::Instant::now();
    screen.draw(&mut app)?;
    loop {
        let mut dirty = false;
        if event::poll(TICK).map_err(failed)? {
            dirty = true;
            match event::read().map_err(failed)? {
                Input::Key(key) => match app.key(key) {
                    act @ (Act::Quit | Act::Interrupt) => {
                        drop(screen);
                        // The worker may be in the middle of a driver's work.
                        leave(if act == Act::Quit { 0 } else { 130 });
                    }
                    act => {
                        dirty = act != Act::Nothing;
                        if let Some(wish) = act.order() {
                            // Without a worker the next turn ends.
                            let _ = order.send(wish);
                        }
                    }
                },
                // The next picture has the new size.
                Input::Resize(..) => {}
                _ => dirty = false,
            }
        }
        loop {
            match told.try_recv() {
                Ok(e) => {
                    dirty = true;
                    app.take(e);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    drop(screen);
                    return match worker.join() {
                        Ok(good) => Ok(ExitCode::from(u8::from(!good?))),
                        Err(panic) => std::panic::resume_unwind(panic),
                    };
                }
            }
        }
        if dirty || app.busy.is_some() && clock.elapsed() >= CLOCK {
            clock = std::time::Instant::now();
            screen.draw(&mut app)?;
        }
    }
}
