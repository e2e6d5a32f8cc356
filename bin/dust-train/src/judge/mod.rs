//! The listwise judge: a problem and K candidate programs in, a ranking from best to worst out.
//!
//! Candidates are shown in a seeded order ([`Permutation`]), because a fixed one lets the model learn
//! positions in place of programs. [`prompt`] asks, [`read`] takes the ranking of the *shown*
//! positions from the answer, and [`Permutation::candidates`] maps it back.

mod parse;
mod prompt;

pub use parse::{Invalid, Parse, parse, read};
pub use prompt::{Permutation, examples, prompt};
