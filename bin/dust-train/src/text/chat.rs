//! Chat messages to text, by the model's own Jinja template.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use jiff::fmt::strtime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::Tokenizer;
use crate::checkpoint::{Error, Gguf, read_text};

/// What the template is called in messages of the template engine.
const NAME: &str = "chat_template";

/// The format that most models with `<|im_start|>` in their vocabulary were trained on.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The instructions that stand above the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
        }
    }
}

/// Choices of a rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChatOptions {
    /// Whether to open the assistant's answer at the end.
    pub add_generation_prompt: bool,
    /// Whether the model shall think before it answers; `None` leaves it to the template. Ignored
    /// by templates that have no such switch.
    pub enable_thinking: Option<bool>,
    /// The time that templates write into the prompt. Fixed by the caller, so that a run that is
    /// resumed on another day has the same prompts.
    pub now: SystemTime,
}

impl Default for ChatOptions {
    /// Opens the answer, leaves thinking to the template, and takes the clock's time.
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            enable_thinking: None,
            now: SystemTime::now(),
        }
    }
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    bos: String,
    eos: String,
    fallback: bool,
}

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (a text, or a list of which the one called `default` is taken).
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let path = folder.join("chat_template.jinja");
        if path.exists() {
            return Self::new(&path, read_text(&path)?, tokenizer);
        }
        let path = folder.join("tokenizer_config.json");
        if !path.exists() {
            return Self::chatml(&path, tokenizer);
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Templates {
            One(String),
            Many(Vec<Named>),
        }
        #[derive(Deserialize)]
        struct Named {
            name: String,
            template: String,
        }
        #[derive(Deserialize)]
        struct Config {
            chat_template: Option<Templates>,
        }
        let config: Config = serde_json::from_str(&read_text(&path)?)
            .map_err(|e| Error::invalid(&path, NAME, e.to_string(), "fetch the file again"))?;
        let source = match config.chat_template {
            Some(Templates::One(template)) => Some(template),
            Some(Templates::Many(list)) => {
                let default = list.into_iter().find(|t| t.name == "default");
                default.map(|t| t.template)
            }
            None => None,
        };
        match source {
            Some(source) => Self::new(&path, source, tokenizer),
            None => Self::chatml(&path, tokenizer),
        }
    }

    /// The template in a GGUF file's metadata.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self, Error> {
        match gguf.string("tokenizer.chat_template")? {
            Some(source) => Self::new(gguf.path(), source.to_owned(), tokenizer),
            None => Self::chatml(gguf.path(), tokenizer),
        }
    }

    /// A template from its source. `file` is for messages.
    pub fn new(file: &Path, source: String, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let mut environment = Environment::new();
        // As `transformers` sets its engine up.
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|e| invalid(file, &e))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // A template is part of a downloaded file: it may not run for ever.
        environment.set_fuel(Some(10_000_000));
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| invalid(file, &e))?;
        Ok(Self {
            path: file.to_owned(),
            environment,
            bos: tokenizer.bos_token().unwrap_or_default().to_owned(),
            eos: tokenizer.eos_token().unwrap_or_default().to_owned(),
            fallback: false,
        })
    }

    fn chatml(file: &Path, tokenizer: &Tokenizer) -> Result<Self, Error> {
        if tokenizer.id("<|im_start|>").is_none() || tokenizer.id("<|im_end|>").is_none() {
            let remedy = "use the instruct variant of the model, or add a chat_template.jinja";
            return Err(Error::invalid(
                file,
                NAME,
                "the model has no chat template",
                remedy,
            ));
        }
        tracing::warn!("{}: no chat template; using ChatML", file.display());
        let template = Self::new(file, CHATML.to_owned(), tokenizer)?;
        Ok(Self {
            fallback: true,
            ..template
        })
    }

    /// Whether the model has no template of its own and ChatML is used instead, because its
    /// vocabulary has ChatML's tokens.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// The prompt for a conversation. Encode it with special tokens allowed.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, Error> {
        let now = options.now;
        let strftime_now = move |format: String| -> Result<String, minijinja::Error> {
            let bad =
                |e: jiff::Error| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string());
            let time = Timestamp::try_from(now).map_err(bad)?;
            strtime::format(&format, time).map_err(bad)
        };
        let thinking = options.enable_thinking;
        let messages: Value = messages
            .iter()
            .map(|m| context! { role => m.role.name(), content => m.content.as_str() })
            .collect();
        self.environment
            .get_template(NAME)
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt => options.add_generation_prompt,
                    bos_token => self.bos.as_str(),
                    eos_token => self.eos.as_str(),
                    enable_thinking => thinking.map_or(Value::UNDEFINED, Value::from),
                    tools => Value::from(()),
                    strftime_now => Value::from_function(strftime_now),
                })
            })
            .map_err(|e| invalid(&self.path, &e))
    }
}

fn invalid(file: &Path, error: &minijinja::Error) -> Error {
    let remedy = "check the roles and their order, or correct the template";
    Error::invalid(file, NAME, error.to_string(), remedy)
}
