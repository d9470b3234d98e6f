//! The reverse map table in software: what state each page of RAM is in, and which changes hardware would take.
//!
//! Owns: states and transitions. Does not own: memory; [`super::views`] shows each page in the view that its state allows.
//! Whatever hardware would fault, or a sound guest never does, is a [`Violation`] and ends the machine.

use coffer_layout::PAGE;
use thiserror::Error;

/// Pages of 2 MiB.
pub const LARGE: u64 = 512;

/// A page's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The hypervisor's: the guest sees it without the C-bit.
    Shared = 0,
    /// The guest's, but it has not accepted it.
    Assigned = 1,
    /// The guest's, accepted.
    Validated = 2,
    /// The guest's since the launch; never to be accepted again.
    Launched = 3,
    /// Holds a processor's state.
    Vmsa = 4,
}

/// What must not happen.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Violation {
    /// Not RAM.
    #[error("{what} of {gpa:#x}, which is not RAM")]
    NotRam {
        /// Operation.
        what: &'static str,
        /// Address.
        gpa: u64,
    },
    /// In a state that does not allow it.
    #[error("{what} of {gpa:#x}, which is {state:?}: {why}")]
    State {
        /// Operation.
        what: &'static str,
        /// Address.
        gpa: u64,
        /// The page's.
        state: State,
        /// What hardware or a sound guest makes of it.
        why: &'static str,
    },
}

/// What PVALIDATE returns in EAX; the carry flag says that nothing changed, which is always a [`Violation`] here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pvalidate {
    /// 0.
    Done,
    /// 1.
    FailInput,
    /// 6: the pages are not one page of that size.
    SizeMismatch,
}

/// All pages of RAM.
#[derive(Debug)]
pub struct Rmp {
    /// `(first page, states)`, sorted.
    ranges: Vec<(u64, Vec<State>)>,
}

impl Rmp {
    /// RAM, `(first address, bytes)`, all of it assigned to the guest: the private attribute is set once before the launch.
    #[must_use]
    pub fn new(ram: &[(u64, u64)]) -> Self {
        let range =
            |(start, size): &(u64, u64)| (start / PAGE, vec![State::Assigned; (size / PAGE) as usize]);
        Self { ranges: ram.iter().map(range).collect() }
    }

    /// A page's state; `None` when it is not RAM.
    #[must_use]
    pub fn state(&self, page: u64) -> Option<State> {
        self.ranges.iter().find_map(|(first, states)| {
            let index = page.checked_sub(*first)?;
            states.get(usize::try_from(index).ok()?).copied()
        })
    }

    fn slot(&mut self, page: u64) -> Option<&mut State> {
        self.ranges.iter_mut().find_map(|(first, states)| {
            let index = page.checked_sub(*first)?;
            states.get_mut(usize::try_from(index).ok()?)
        })
    }

    fn set(&mut self, page: u64, state: State) {
        if let Some(slot) = self.slot(page) {
            *slot = state;
        }
    }

    fn look(&self, what: &'static str, page: u64) -> Result<State, Violation> {
        self.state(page).ok_or(Violation::NotRam { what, gpa: page.wrapping_mul(PAGE) })
    }

    /// A page of the launch.
    ///
    /// # Errors
    /// When it was launched before, or is no RAM of the guest's.
    pub fn launch(&mut self, page: u64) -> Result<(), Violation> {
        let what = "the launch";
        match self.look(what, page)? {
            State::Assigned => {
                self.set(page, State::Launched);
                Ok(())
            }
            state => Err(Violation::State { what, gpa: page * PAGE, state, why: "it can be launched once" }),
        }
    }

    /// PVALIDATE of 4 KiB, or of 2 MiB when `large`. `validate` is false to give up a page.
    ///
    /// # Errors
    /// [`Violation`], and nothing changed.
    pub fn pvalidate(&mut self, page: u64, large: bool, validate: bool) -> Result<Pvalidate, Violation> {
        let what = if validate { "PVALIDATE" } else { "PVALIDATE (rescind)" };
        if large && !page.is_multiple_of(LARGE) {
            return Ok(Pvalidate::FailInput);
        }
        let pages = if large { LARGE } else { 1 };
        let first = self.look(what, page)?;
        for page in page..page + pages {
            let state = self.look(what, page)?;
            if large && state != first {
                // A launched page, or one in another state, is an RMP entry of 4 KiB: hardware finds no 2 MiB entry.
                return Ok(Pvalidate::SizeMismatch);
            }
            let why = match (state, validate) {
                (State::Assigned, true) | (State::Validated | State::Launched, false) => continue,
                (State::Shared, _) => {
                    "hardware faults to the hypervisor: the page is not assigned to the guest"
                }
                (State::Assigned, false) => "nothing changes: a sound guest takes that for an attack",
                (State::Validated, true) => "it is validated twice: a sound guest takes that for an attack",
                (State::Launched, true) => "the launch validated it: a sound guest never does it again",
                (State::Vmsa, _) => "a processor's state lies there",
            };
            return Err(Violation::State { what, gpa: page * PAGE, state, why });
        }
        for page in page..page + pages {
            self.set(page, if validate { State::Validated } else { State::Assigned });
        }
        Ok(Pvalidate::Done)
    }

    /// RMPADJUST: true when it marks the page as VMSA or takes the mark away; the guest runs at VMPL 0.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn rmpadjust(&mut self, page: u64, vmsa: bool) -> Result<(), Violation> {
        let what = "RMPADJUST";
        let (state, gpa) = (self.look(what, page)?, page * PAGE);
        let next = match (state, vmsa) {
            (State::Validated | State::Launched, false) => state,
            (State::Validated, true) => State::Vmsa,
            (State::Vmsa, false) => State::Validated,
            (State::Vmsa, true) => State::Vmsa,
            (State::Launched, true) => {
                return Err(Violation::State { what, gpa, state, why: "no launched page becomes a VMSA" });
            }
            (State::Shared | State::Assigned, _) => {
                return Err(Violation::State {
                    what,
                    gpa,
                    state,
                    why: "hardware faults: it is not validated",
                });
            }
        };
        self.set(page, next);
        Ok(())
    }

    /// A page state change, as the hypervisor does it for the guest.
    ///
    /// # Errors
    /// [`Violation`]: a guest gives a page up (PVALIDATE) before it makes it shared, and makes no change that is none.
    pub fn change(&mut self, page: u64, private: bool) -> Result<(), Violation> {
        let what = if private { "page state change to private" } else { "page state change to shared" };
        let (state, gpa) = (self.look(what, page)?, page * PAGE);
        match (state, private) {
            (State::Shared, true) => self.set(page, State::Assigned),
            (State::Assigned, false) => self.set(page, State::Shared),
            (State::Shared, false) | (State::Assigned, true) => {
                return Err(Violation::State { what, gpa, state, why: "it is in that state already" });
            }
            (State::Validated | State::Launched | State::Vmsa, _) => {
                return Err(Violation::State {
                    what,
                    gpa,
                    state,
                    why: "the guest did not give it up by PVALIDATE first: its contents would be lost",
                });
            }
        }
        Ok(())
    }

    /// First page of RAM that is neither accepted nor shared, if there is one: Linux takes all RAM for accepted.
    #[must_use]
    pub fn first_unvalidated(&self) -> Option<u64> {
        let find = |(first, states): &(u64, Vec<State>)| {
            states.iter().position(|s| *s == State::Assigned).map(|at| (first + at as u64) * PAGE)
        };
        self.ranges.iter().find_map(find)
    }

    /// How many pages are shared, and how many the guest holds.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        let states = || self.ranges.iter().flat_map(|(_, s)| s);
        let shared = states().filter(|s| **s == State::Shared).count() as u64;
        (shared, states().count() as u64 - shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: [(u64, u64); 2] = [(0, 8 << 20), (4 << 30, 4 << 20)];

    #[test]
    fn a_page_goes_from_assigned_to_validated_to_shared_and_back() {
        let mut rmp = Rmp::new(&RAM);
        assert_eq!(rmp.pvalidate(5, false, true), Ok(Pvalidate::Done));
        assert_eq!(rmp.pvalidate(5, false, false), Ok(Pvalidate::Done));
        rmp.change(5, false).unwrap();
        assert_eq!(rmp.state(5), Some(State::Shared));
        rmp.change(5, true).unwrap();
        assert_eq!(rmp.pvalidate(5, false, true), Ok(Pvalidate::Done));
        rmp.rmpadjust(5, true).unwrap();
        assert_eq!(rmp.state(5), Some(State::Vmsa));
    }

    #[test]
    fn large_pages_are_validated_at_once_unless_they_are_in_parts() {
        let mut rmp = Rmp::new(&RAM);
        assert_eq!(rmp.pvalidate(LARGE, true, true), Ok(Pvalidate::Done));
        assert_eq!(rmp.state(2 * LARGE - 1), Some(State::Validated));
        assert_eq!(rmp.pvalidate(1, true, true), Ok(Pvalidate::FailInput));
        rmp.launch(8).unwrap();
        assert_eq!(rmp.pvalidate(0, true, true), Ok(Pvalidate::SizeMismatch));
        assert_eq!(rmp.first_unvalidated(), Some(0));
    }

    #[test]
    fn what_hardware_or_a_sound_guest_would_stop_at_is_a_violation() {
        let mut rmp = Rmp::new(&RAM);
        rmp.launch(1).unwrap();
        rmp.pvalidate(2, false, true).unwrap();
        rmp.change(3, false).unwrap();
        let violated = |what: &str, result: Result<(), Violation>| assert!(result.is_err(), "{what}");
        violated("launched twice", rmp.launch(1));
        violated("launch page validated", rmp.pvalidate(1, false, true).map(drop));
        violated("validated twice", rmp.pvalidate(2, false, true).map(drop));
        violated("shared page validated", rmp.pvalidate(3, false, true).map(drop));
        violated("rescinded without need", rmp.pvalidate(4, false, false).map(drop));
        violated("validated page made shared", rmp.change(2, false));
        violated("shared twice", rmp.change(3, false));
        violated("private twice", rmp.change(4, true));
        violated("VMSA not validated", rmp.rmpadjust(4, true));
        violated("not RAM", rmp.pvalidate(8 << 8, false, true).map(drop));
        violated("wraps around", rmp.change(u64::MAX, true));
    }

    proptest! {
        #[test]
        fn no_sequence_panics_or_makes_a_shared_page_validated(
            steps in prop::collection::vec((0u8..5, 0u64..3000, any::<bool>(), any::<bool>()), 0..200),
        ) {
            let mut rmp = Rmp::new(&RAM);
            for (step, page, a, b) in steps {
                let before = rmp.state(page);
                match step {
                    0 => drop(rmp.launch(page)),
                    1 => drop(rmp.pvalidate(page, a, b)),
                    2 => drop(rmp.rmpadjust(page, a)),
                    _ => drop(rmp.change(page, a)),
                }
                let after = rmp.state(page);
                prop_assert!(before != Some(State::Shared) || matches!(after, Some(State::Shared | State::Assigned)));
                prop_assert!(after != Some(State::Shared) || matches!(before, Some(State::Shared | State::Assigned)));
            }
            let (shared, private) = rmp.totals();
            prop_assert_eq!(shared + private, 3072);
        }
    }
}
