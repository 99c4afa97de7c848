//! A model written as `layers=2,kv_heads=4,head_dim=64,dtype=bf16`.

use super::presets::{keys_and_values, latent};
use super::{Dtype, Extent, KvPlacement, Model, PlanePlacement};
use crate::limits::{LAYERS_MAX, TOKENS_MAX};

const KEYS: &str = "layers, kv_heads, head_dim, dtype, window, latent, kv, planes";

/// What a geometry specification says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeometrySpec {
    /// The model: one layer group, all layers alike.
    pub model: Model,
    /// `kv=separate|interleaved`.
    pub kv: KvPlacement,
    /// `planes=one|per-layer`.
    pub planes: PlanePlacement,
}

/// Why a geometry specification cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// A part is not `key=value`.
    #[error("`{part}` in the geometry is not key=value: write for example layers=2")]
    NotKeyValue {
        /// The part between commas.
        part: String,
    },
    /// A key that does not exist.
    #[error("the geometry has no key `{key}`: use {KEYS}")]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// A key that stands there twice.
    #[error("the geometry gives `{key}` twice: keep one")]
    Twice {
        /// The key.
        key: String,
    },
    /// A value that the key does not take.
    #[error("the geometry's `{key}={value}` is not allowed: use {allowed}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A key that must be there.
    #[error("the geometry lacks `{key}`: add it ({reason})")]
    Missing {
        /// The key.
        key: &'static str,
        /// Why it is needed.
        reason: &'static str,
    },
    /// Keys that exclude each other.
    #[error("the geometry gives both `latent` and `{key}`: a latent has neither heads nor head dimension, drop one")]
    Conflict {
        /// The other key.
        key: &'static str,
    },
}

impl Model {
    /// Reads `layers=..,kv_heads=..,head_dim=..` (K and V per head) or `layers=..,latent=..` (one replicated latent), with
    /// `dtype` (bf16), `window` (tokens; all layers), `kv` (separate) and `planes` (one).
    pub fn from_spec(spec: &str) -> Result<GeometrySpec, SpecError> {
        let mut keys = Keys::default();
        for part in spec.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| SpecError::NotKeyValue { part: part.to_owned() })?;
            keys.set(key.trim(), value.trim())?;
        }
        let count = keys.layers.ok_or(SpecError::Missing { key: "layers", reason: "how many layers keep KV" })?;
        let layers: Vec<u32> = (0..count).collect();
        let dtype = keys.dtype.unwrap_or(Dtype::Bf16);
        let mut group = match (keys.latent, keys.kv_heads, keys.head_dim) {
            (Some(_), Some(_), _) => return Err(SpecError::Conflict { key: "kv_heads" }),
            (Some(_), None, Some(_)) => return Err(SpecError::Conflict { key: "head_dim" }),
            (Some(elements), None, None) => latent(layers, elements, dtype),
            (None, Some(kv_heads), Some(head_dim)) => keys_and_values(layers, kv_heads, head_dim, dtype),
            (None, None, _) => return Err(SpecError::Missing { key: "kv_heads", reason: "or latent, for MLA" }),
            (None, Some(_), None) => return Err(SpecError::Missing { key: "head_dim", reason: "elements of a head" }),
        };
        if let Some(tokens) = keys.window {
            group.extent = Extent::Window { tokens };
        }
        let model = Model { name: spec.to_owned(), layers: count, groups: vec![group] };
        Ok(GeometrySpec { model, kv: keys.kv.unwrap_or_default(), planes: keys.planes.unwrap_or_default() })
    }
}

#[derive(Default)]
struct Keys {
    layers: Option<u32>,
    kv_heads: Option<u32>,
    head_dim: Option<u32>,
    dtype: Option<Dtype>,
    window: Option<u32>,
    latent: Option<u32>,
    kv: Option<KvPlacement>,
    planes: Option<PlanePlacement>,
}

/// Heads or elements of one head; far above every model, far below what could overflow.
const DIMENSION_MAX: u32 = 1 << 16;

impl Keys {
    fn set(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        let twice = match key {
            "layers" => self.layers.replace(number("layers", value, LAYERS_MAX)?).is_some(),
            "kv_heads" => self.kv_heads.replace(number("kv_heads", value, DIMENSION_MAX)?).is_some(),
            "head_dim" => self.head_dim.replace(number("head_dim", value, DIMENSION_MAX)?).is_some(),
            "window" => self.window.replace(number("window", value, TOKENS_MAX as u32)?).is_some(),
            "latent" => self.latent.replace(number("latent", value, DIMENSION_MAX)?).is_some(),
            "dtype" => {
                let allowed = "bf16, f16, f32, fp8, fp8_e5m2, int8 or uint8";
                self.dtype.replace(value.parse().map_err(|_| refused("dtype", value, allowed))?).is_some()
            }
            "kv" => {
                let choices = [("separate", KvPlacement::Separate), ("interleaved", KvPlacement::Interleaved)];
                self.kv.replace(choice("kv", value, choices)?).is_some()
            }
            "planes" => {
                let choices = [("one", PlanePlacement::One), ("per-layer", PlanePlacement::PerLayer)];
                self.planes.replace(choice("planes", value, choices)?).is_some()
            }
            _ => return Err(SpecError::UnknownKey { key: key.to_owned() }),
        };
        if twice { Err(SpecError::Twice { key: key.to_owned() }) } else { Ok(()) }
    }
}

fn number(key: &'static str, value: &str, limit: u32) -> Result<u32, SpecError> {
    match value.parse() {
        Ok(number) if (1..=limit).contains(&number) => Ok(number),
        _ => Err(refused(key, value, &format!("a number from 1 to {limit}"))),
    }
}

fn choice<T>(key: &'static str, value: &str, choices: [(&str, T); 2]) -> Result<T, SpecError> {
    let allowed = format!("{} or {}", choices[0].0, choices[1].0);
    choices
        .into_iter()
        .find(|(name, _)| *name == value)
        .map(|(_, choice)| choice)
        .ok_or_else(|| refused(key, value, &allowed))
}

fn refused(key: &'static str, value: &str, allowed: &str) -> SpecError {
    SpecError::Value { key, value: value.to_owned(), allowed: allowed.to_owned() }
}
