//! What of a container or process only a KBS can give: opened by a thread, beside PID 1's loop.
//!
//! Owns: which of it there is. Does not own: how it is opened (coffer-attestation's `Guest`), volumes (`secrets`), the thread.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use coffer_attestation::guest::Guest;
use coffer_protocol::ErrorKind;
use serde_json::Value;

use crate::{confidential::hold, container::ContainerError, secrets};

/// It, of one container or process.
pub struct Sealed {
    guest: Arc<Mutex<Guest>>,
    environment: bool,
    volumes: Vec<secrets::Volume>,
    /// Where to say that they are there.
    credentials: Option<Arc<AtomicBool>>,
}

fn failed(error: impl std::fmt::Display) -> ContainerError {
    ContainerError::new(ErrorKind::Guest, error.to_string())
}

/// Whether a process has a variable that may be sealed.
fn has_variable(process: &Value) -> bool {
    let environment = process.get("env").and_then(Value::as_array).into_iter().flatten();
    environment.filter_map(Value::as_str).any(|pair| pair.contains("=sealed."))
}

impl Sealed {
    /// Of a further process.
    pub(crate) fn of_process(guest: &Arc<Mutex<Guest>>, process: &Value) -> Option<Self> {
        has_variable(process).then(|| Self {
            guest: guest.clone(),
            environment: true,
            volumes: Vec::new(),
            credentials: None,
        })
    }

    /// Of a container. `credentials` is whether they are there.
    pub(crate) fn of(guest: &Arc<Mutex<Guest>>, spec: &Value, credentials: &Arc<AtomicBool>) -> Option<Self> {
        let (has_kbs, wants_credentials) = {
            let guest = hold(guest);
            (guest.config().kbs.is_some(), !guest.config().credentials.is_empty())
        };
        let sealed = Self {
            guest: guest.clone(),
            environment: spec.get("process").is_some_and(has_variable),
            volumes: if has_kbs { secrets::find(spec) } else { Vec::new() },
            credentials: Some(credentials)
                .filter(|there| wants_credentials && !there.load(Ordering::Relaxed))
                .cloned(),
        };
        let any = sealed.environment || !sealed.volumes.is_empty() || sealed.credentials.is_some();
        any.then_some(sealed)
    }

    /// Opens a process's variables.
    ///
    /// # Errors
    /// [`ContainerError`], naming the variable.
    pub fn open_process(&self, process: &mut Value) -> Result<(), ContainerError> {
        let list = process.get_mut("env").and_then(Value::as_array_mut).filter(|_| self.environment);
        let Some(list) = list else { return Ok(()) };
        let mut environment: Vec<String> =
            list.iter().map(|v| v.as_str().unwrap_or_default().to_owned()).collect();
        hold(&self.guest).unseal_environment(&mut environment).map_err(failed)?;
        *list = environment.into_iter().map(Value::from).collect();
        Ok(())
    }

    /// Opens all that a container has, and fetches the owner's credentials.
    ///
    /// # Errors
    /// [`ContainerError`], naming the variable or file.
    pub fn open(self, id: &str, spec: &mut Value) -> Result<(), ContainerError> {
        if let Some(process) = spec.get_mut("process") {
            self.open_process(process)?;
        }
        let mut guest = hold(&self.guest);
        let mut open = |text: &str| guest.unseal(text).map_err(|e| e.to_string());
        secrets::open_volumes(id, spec, self.volumes, &mut open).map_err(failed)?;
        if let Some(there) = self.credentials {
            let files = guest.credentials().map_err(failed)?;
            let files: Vec<_> =
                files.into_iter().map(|(path, secret)| (PathBuf::from(path), secret)).collect();
            secrets::write_credentials(&files).map_err(failed)?;
            there.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}
