//! The image's configuration (image-spec, config.md): what to run, as whom, from which layers.
//!
//! Owns: its JSON and what a container's process takes from it. The caller checked the blob's digest.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::Digest;

/// The configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not JSON of the wanted shape.
    #[error("image config: {0}")]
    Json(#[from] serde_json::Error),
    /// For another system.
    #[error("image config: it is for {0}/{1}, this machine is linux/{2}")]
    Platform(String, String, &'static str),
    /// Layers and diff_ids do not pair.
    #[error("image config: {0} diff_ids for {1} layers of the manifest")]
    Layers(usize, usize),
    /// Nothing to run.
    #[error("image config: neither Entrypoint nor Cmd, and no command was given")]
    NoCommand,
}

/// The configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct ImageConfig {
    pub architecture: String,
    pub os: String,
    #[serde(default)]
    pub config: Option<Run>,
    pub rootfs: RootFs,
}

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct Run {
    pub user: String,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub working_dir: String,
    pub stop_signal: String,
}

/// The layers' digests, unpacked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct RootFs {
    #[serde(rename = "type")]
    pub kind: String,
    pub diff_ids: Vec<Digest>,
}

/// A container's process, as the verified image wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the runtime specification's names")]
pub struct Process {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    /// As the image says it: `name`, `uid`, `name:group`, `uid:gid`; empty for root.
    pub user: String,
    pub stop_signal: Option<String>,
}

impl ImageConfig {
    /// Reads it and checks that it is for this machine and pairs with `layers` layers.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(bytes)?;
        let here = crate::manifest::architecture();
        if config.os != "linux" || config.architecture != here {
            return Err(ConfigError::Platform(config.os, config.architecture, here));
        }
        if config.rootfs.diff_ids.len() != layers {
            return Err(ConfigError::Layers(config.rootfs.diff_ids.len(), layers));
        }
        Ok(config)
    }

    /// The process: `command` replaces Cmd when it is not empty, as `podman run IMAGE COMMAND…` does, and
    /// `entrypoint` replaces both. Its entries come after the image's in `env` and win.
    ///
    /// # Errors
    /// [`ConfigError::NoCommand`].
    pub fn process(
        &self,
        entrypoint: Option<&[String]>,
        command: &[String],
        env: &[String],
    ) -> Result<Process, ConfigError> {
        let run = self.config.clone().unwrap_or_default();
        let mut args = match entrypoint {
            Some(words) => words.to_vec(),
            None => run.entrypoint.clone().unwrap_or_default(),
        };
        if !command.is_empty() {
            args.extend_from_slice(command);
        } else if entrypoint.is_none() {
            args.extend(run.cmd.unwrap_or_default());
        }
        if args.is_empty() {
            return Err(ConfigError::NoCommand);
        }
        let mut all: Vec<String> = Vec::new();
        for entry in run.env.iter().flatten().chain(env) {
            let name = entry.split('=').next().unwrap_or_default();
            all.retain(|have| have.split('=').next() != Some(name));
            all.push(entry.clone());
        }
        if !all.iter().any(|entry| entry.starts_with("PATH=")) {
            all.insert(0, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        }
        Ok(Process {
            args,
            env: all,
            cwd: if run.working_dir.is_empty() { "/".into() } else { run.working_dir },
            user: run.user,
            stop_signal: Some(run.stop_signal).filter(|signal| !signal.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(run: serde_json::Value) -> ImageConfig {
        let text = serde_json::json!({
            "architecture": crate::manifest::architecture(), "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": []}, "history": [{"created_by": "x"}],
        });
        ImageConfig::parse(text.to_string().as_bytes(), 0).unwrap()
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn entrypoint_and_cmd_join_as_podman_joins_them() {
        let c = config(serde_json::json!({"Entrypoint": ["/e", "-x"], "Cmd": ["a"], "Env": null}));
        assert_eq!(c.process(None, &[], &[]).unwrap().args, ["/e", "-x", "a"]);
        assert_eq!(c.process(None, &words(&["b"]), &[]).unwrap().args, ["/e", "-x", "b"]);
        assert_eq!(c.process(Some(&words(&["/f"])), &[], &[]).unwrap().args, ["/f"]);
        assert!(matches!(config(serde_json::json!({})).process(None, &[], &[]), Err(ConfigError::NoCommand)));
    }

    #[test]
    fn environment_of_the_caller_wins() {
        let c = config(
            serde_json::json!({"Cmd": ["a"], "Env": ["A=1", "PATH=/b"], "WorkingDir": "/w", "User": "u:g"}),
        );
        let p = c.process(None, &[], &words(&["A=2"])).unwrap();
        assert_eq!((p.env, p.cwd.as_str(), p.user.as_str()), (words(&["PATH=/b", "A=2"]), "/w", "u:g"));
    }

    #[test]
    fn another_machine_or_other_layers_are_refused() {
        let text = br#"{"architecture":"s390x","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        let message = ImageConfig::parse(text, 0).unwrap_err().to_string();
        assert!(message.starts_with("image config: it is for linux/s390x"), "{message}");
        let text = format!(
            r#"{{"architecture":"{}","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}}}}"#,
            crate::manifest::architecture()
        );
        assert!(matches!(ImageConfig::parse(text.as_bytes(), 2), Err(ConfigError::Layers(0, 2))));
    }
}
