//! Text in and out of a model: tokens and chat messages.

mod chat;
mod tokenizer;

pub use chat::{ChatOptions, ChatTemplate, Message, Role};
pub use tokenizer::{StreamDecoder, Tokenizer};
