//! Text in and out of a model: tokens and chat messages.

mod chat;
mod encode;
mod tokenizer;

pub use chat::{ChatOptions, ChatTemplate, Message, Role};
pub use encode::encode_chat;
pub use tokenizer::{StreamDecoder, Tokenizer};
