//! Download of a hub repository into the Hugging Face cache, through crate `hf-hub`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::error::Error;
use super::safetensors::read_index;
use super::{INDEX_FILE, WEIGHTS_FILE, write};

/// The folder with all files of `Owner/Name` or `Owner/Name@revision` that a checkpoint needs.
///
/// A complete copy in the cache is used without asking the hub, so that a run does not change
/// because someone has pushed to the repository.
pub(super) fn fetch(spec: &str) -> Result<PathBuf, Error> {
    let (name, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let word = |w: &str| {
        !w.is_empty()
            && !w.starts_with('.')
            && w.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if !name
        .split_once('/')
        .is_some_and(|(a, b)| word(a) && word(b))
        || !word(revision)
    {
        return Err(Error::invalid(
            spec,
            "model",
            "there is no such file or folder, and it is no repository name",
            "give a folder, a .gguf file, or Owner/Name for the hub",
        ));
    }

    let set = |variable: &str| std::env::var(variable).ok().filter(|v| !v.is_empty());
    // Without either, hf-hub has no place for its cache and panics.
    if set("HF_HOME").is_none() && std::env::home_dir().is_none() {
        let problem = "the cache has no place, because neither HF_HOME nor HOME is set";
        return Err(Error::invalid(
            spec,
            "HF_HOME",
            problem,
            "set HF_HOME to a folder",
        ));
    }
    let cache = match set("HF_HOME") {
        Some(_) => Cache::from_env(),
        None => Cache::default(),
    };
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned());
    if let Some(folder) = cached(&cache.repo(repo.clone())) {
        return Ok(folder);
    }

    let failed = |field: &str, error: ApiError| {
        let remedy =
            "check the name, the network, HF_ENDPOINT, and HF_TOKEN if it is a gated model";
        Error::invalid(
            spec,
            field,
            format!("the hub does not deliver it: {error}"),
            remedy,
        )
    };
    let mut builder = ApiBuilder::from_cache(cache).with_retries(3);
    if let Some(endpoint) = set("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if let Some(token) = set("HF_TOKEN") {
        builder = builder.with_token(Some(token.trim().to_owned()));
    }
    let api = builder
        .build()
        .map_err(|e| failed("HF_ENDPOINT", e))?
        .repo(repo);
    let info = api.info().map_err(|e| failed("repository", e))?;
    let files: BTreeSet<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let get = |file: &str| api.get(file).map_err(|e| failed(file, e));

    // The weights come last: their presence means that everything else is there too.
    let config = get("config.json")?;
    for file in write::TEXT_FILES.iter().filter(|f| files.contains(**f)) {
        get(file)?;
    }
    if files.contains(INDEX_FILE) {
        for shard in shards(&get(INDEX_FILE)?)? {
            get(&shard)?;
        }
    } else {
        get(WEIGHTS_FILE)?;
    }
    // The cache's snapshot folder, which `config.json` lies in.
    Ok(config.parent().map(PathBuf::from).unwrap_or_default())
}

fn shards(index: &Path) -> Result<BTreeSet<String>, Error> {
    Ok(read_index(index)?.into_values().collect())
}

fn cached(repo: &CacheRepo) -> Option<PathBuf> {
    let config = repo.get("config.json")?;
    match repo.get(INDEX_FILE) {
        Some(index) => {
            for shard in shards(&index).ok()? {
                repo.get(&shard)?;
            }
        }
        None => {
            repo.get(WEIGHTS_FILE)?;
        }
    }
    Some(config.parent()?.to_owned())
}
