//! What the screen shows, and what its keys do.

use super::probe::{Probe, Stage};
use super::versions::Versions;
use super::watch::{Event, Order};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use std::collections::BTreeMap;
use std::time::Instant;

/// A look under way.
pub struct Busy {
    pub what: String,
    pub since: Instant,
    pub stage: Stage,
}

/// The state of the screen.
pub struct App {
    /// `layer_norm`.
    pub op: String,
    /// The case's parameters.
    pub params: String,
    /// Every case of the op.
    pub cases: Vec<String>,
    /// `wgpu`, `cuda:sim`.
    pub backend: String,
    /// The folder.
    pub dir: String,
    /// None while it watches.
    pub busy: Option<Busy>,
    /// By parameters.
    pub seen: BTreeMap<String, Versions>,
    /// First line of the verdict that is shown.
    pub line: usize,
    /// First version of the history that is shown, from the newest.
    pub older: usize,
    /// Whether the keys are explained.
    pub help: bool,
}

/// What a key asks of the program.
#[derive(Debug, PartialEq, Eq)]
pub enum Act {
    Quit,
    Interrupt,
    Again,
    Case(String),
    /// Show what changed.
    Draw,
    Nothing,
}

impl App {
    pub fn new(probe: &Probe) -> App {
        let mut cases: Vec<String> = probe.room.cases.iter().map(ToString::to_string).collect();
        if !cases.contains(&probe.params) {
            cases.insert(0, probe.params.clone());
        }
        App {
            op: probe.room.name.into(),
            params: probe.params.clone(),
            cases,
            backend: probe.name.clone(),
            dir: probe.dir.display().to_string(),
            busy: None,
            seen: BTreeMap::new(),
            line: 0,
            older: 0,
            help: false,
        }
    }

    /// The versions of the present case.
    pub fn versions(&self) -> Option<&Versions> {
        self.seen.get(&self.params)
    }

    /// Takes in what the loop tells.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Begun { what, since } => {
                self.busy = Some(Busy {
                    what,
                    since,
                    stage: Stage::Compiling,
                });
            }
            Event::Stage(stage) => {
                if let Some(busy) = &mut self.busy {
                    busy.stage = stage;
                }
            }
            Event::Done(version) => {
                self.busy = None;
                (self.line, self.older) = (0, 0);
                // Of the case that was looked at, which need not be the present one any more.
                let params = version.case.strip_prefix(&format!("{}(", self.op));
                let params = params.and_then(|p| p.strip_suffix(')'));
                let params = params.unwrap_or(&self.params).to_string();
                self.seen.entry(params).or_default().all.push(version);
            }
        }
    }

    /// The case `step` further, around.
    fn other_case(&self, step: usize) -> String {
        let at = self.cases.iter().position(|c| *c == self.params);
        self.cases[(at.unwrap_or(0) + step) % self.cases.len()].clone()
    }

    /// What a key does.
    pub fn key(&mut self, key: KeyEvent) -> Act {
        if key.kind == KeyEventKind::Release {
            return Act::Nothing;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Act::Interrupt,
                _ => Act::Nothing,
            };
        }
        if self.help {
            self.help = false;
            return match key.code {
                KeyCode::Char('q') => Act::Quit,
                _ => Act::Draw,
            };
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Act::Quit,
            KeyCode::Char('r') => return Act::Again,
            KeyCode::Char(c @ ('c' | 'C')) => {
                let step = if c == 'c' { 1 } else { self.cases.len() - 1 };
                self.params = self.other_case(step);
                (self.line, self.older) = (0, 0);
                return Act::Case(self.params.clone());
            }
            KeyCode::Char('b') => {
                if let Some(versions) = self.seen.get_mut(&self.params) {
                    let newest = versions.newest_right();
                    versions.base = newest.filter(|_| versions.base != newest);
                }
            }
            KeyCode::Char('?' | 'h') => self.help = true,
            KeyCode::Up | KeyCode::Char('k') => self.line = self.line.saturating_sub(1),
            // The end is known where it is drawn.
            KeyCode::Down | KeyCode::Char('j') => self.line += 1,
            KeyCode::PageUp => self.older = self.older.saturating_sub(5),
            KeyCode::PageDown => self.older += 5,
            _ => return Act::Nothing,
        }
        Act::Draw
    }
}

impl Act {
    /// What the loop is asked for it.
    pub fn order(self) -> Option<Order> {
        match self {
            Act::Again => Some(Order::Again),
            Act::Case(params) => Some(Order::Case(params)),
            _ => None,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::probe::Outcome;
    use super::super::versions::tests::{right, version};
    use super::*;

    pub fn app() -> App {
        App {
            op: "layer_norm".into(),
            params: "n=2,t=3,c=5".into(),
            cases: vec!["n=2,t=3,c=5".into(), "n=1,t=1,c=9".into()],
            backend: "wgpu".into(),
            dir: "shaders".into(),
            busy: None,
            seen: BTreeMap::new(),
            line: 0,
            older: 0,
            help: false,
        }
    }

    fn press(app: &mut App, code: KeyCode) -> Act {
        app.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn keys_quit_repeat_and_change_the_case() {
        let mut app = app();
        assert_eq!(press(&mut app, KeyCode::Char('r')), Act::Again);
        let other = Act::Case("n=1,t=1,c=9".into());
        assert_eq!(press(&mut app, KeyCode::Char('c')), other);
        let first = Act::Case("n=2,t=3,c=5".into());
        assert_eq!(press(&mut app, KeyCode::Char('c')), first);
        assert_eq!(press(&mut app, KeyCode::Char('C')), other);
        assert_eq!(press(&mut app, KeyCode::Char('x')), Act::Nothing);
        assert_eq!(press(&mut app, KeyCode::Char('?')), Act::Draw);
        assert!(app.help);
        assert_eq!(press(&mut app, KeyCode::Esc), Act::Draw);
        assert!(!app.help);
        assert_eq!(press(&mut app, KeyCode::Esc), Act::Quit);
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(app.key(interrupt), Act::Interrupt);
    }

    #[test]
    fn the_base_is_set_and_given_up() {
        let mut app = app();
        press(&mut app, KeyCode::Char('b'));
        app.take(Event::Done(right("as it is", &[("layer_norm", 2.0)])));
        app.take(Event::Done(version("x.wgsl", Outcome::Wrong("y0".into()))));
        press(&mut app, KeyCode::Char('b'));
        assert_eq!(app.versions().unwrap().base, Some(0));
        app.take(Event::Done(right("x.wgsl", &[("layer_norm", 1.0)])));
        press(&mut app, KeyCode::Char('b'));
        assert_eq!(app.versions().unwrap().base, Some(2));
        press(&mut app, KeyCode::Char('b'));
        assert_eq!(app.versions().unwrap().base, None);
    }

    #[test]
    fn a_look_ends_at_the_case_that_it_was_of() {
        let mut app = app();
        app.take(Event::Begun {
            what: "as it is".into(),
            since: Instant::now(),
        });
        app.take(Event::Stage(Stage::Measuring));
        assert_eq!(app.busy.as_ref().unwrap().stage, Stage::Measuring);
        press(&mut app, KeyCode::Char('c'));
        app.take(Event::Done(right("as it is", &[("layer_norm", 2.0)])));
        assert!(app.versions().is_none() && app.busy.is_none());
        assert_eq!(app.seen["n=2,t=3,c=5"].all.len(), 1);
    }
}
