//! Members of a manifest, by path: every one is asked for, or refused by name.

use serde_json::{Map, Value};
use thiserror::Error;

/// A member that no policy can be written for. The path is the manifest's.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("policy: {path}: {why}")]
pub struct FieldError {
    /// Such as `spec.containers[0].image`.
    pub path: String,
    /// What is wrong with it, and what to do.
    pub why: String,
}

/// An object of the manifest, whose members are taken one by one.
#[derive(Clone, Debug)]
pub(super) struct Fields {
    path: String,
    members: Map<String, Value>,
}

impl Fields {
    pub(super) fn of(path: &str, value: Value) -> Result<Self, FieldError> {
        match value {
            Value::Object(members) => Ok(Self { path: path.to_owned(), members }),
            Value::Null => Ok(Self { path: path.to_owned(), members: Map::new() }),
            _ => Err(error(path, "it has to be a mapping")),
        }
    }

    pub(super) fn error(&self, name: &str, why: impl Into<String>) -> FieldError {
        error(&self.path_of(name), why)
    }

    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A member that is there and not null.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, FieldError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(name, "it has to be text: put it into quotes")),
        }
    }

    pub(super) fn required(&mut self, name: &str) -> Result<String, FieldError> {
        self.text(name)?.ok_or_else(|| self.error(name, "it is missing"))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, FieldError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.error(name, "it has to be true or false")),
        }
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<u32>, FieldError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number.map(Some).ok_or_else(|| self.error(name, "it has to be a number below 2^32"))
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Vec<Value>, FieldError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => Ok(items),
            Some(_) => Err(self.error(name, "it has to be a list")),
        }
    }

    pub(super) fn words(&mut self, name: &str) -> Result<Vec<String>, FieldError> {
        let items = self.list(name)?;
        let words = items.into_iter().map(|item| match item {
            Value::String(word) => Ok(word),
            _ => Err(self.error(name, "its entries have to be text: put them into quotes")),
        });
        words.collect()
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Self, FieldError> {
        let value = self.take(name).unwrap_or_default();
        Self::of(&self.path_of(name), value)
    }

    pub(super) fn objects(&mut self, name: &str) -> Result<Vec<Self>, FieldError> {
        let items = self.list(name)?.into_iter().enumerate();
        items.map(|(at, item)| Self::of(&format!("{}[{at}]", self.path_of(name)), item)).collect()
    }

    /// Refuses members when they say anything.
    pub(super) fn refuse(&mut self, names: &[&str], why: &str) -> Result<(), FieldError> {
        for name in names {
            match self.take(name) {
                None | Some(Value::Bool(false)) => {}
                Some(Value::Array(items)) if items.is_empty() => {}
                Some(Value::Object(members)) if members.is_empty() => {}
                Some(_) => return Err(self.error(name, why)),
            }
        }
        Ok(())
    }

    /// What is left is not known, apart from those that change nothing inside a container.
    pub(super) fn end(self, harmless: &[&str]) -> Result<(), FieldError> {
        let unknown = self.members.keys().find(|name| !harmless.contains(&name.as_str()));
        unknown.map_or(Ok(()), |name| {
            Err(self.error(name, "it is not known here: leave it out, or write the policy by hand"))
        })
    }
}

pub(super) fn error(path: &str, why: impl Into<String>) -> FieldError {
    FieldError { path: path.to_owned(), why: why.into() }
}
