//! Models by name.

use super::{Dtype, Extent, LayerGroup, Model, Sharding, Tensor};

impl Model {
    /// The names that [`Model::preset`] knows.
    pub const PRESETS: [&'static str; 8] = [
        "llama-3.1-8b",
        "llama-3.1-70b",
        "qwen3-32b",
        "qwen3-235b",
        "deepseek-r1",
        "gpt-oss-120b",
        "qwen3-next",
        "tiny",
    ];

    /// A model by its name, one of [`Model::PRESETS`].
    pub fn preset(name: &str) -> Option<Model> {
        let (layers, groups) = match name {
            "llama-3.1-8b" => (32, vec![attention((0..32).collect(), 8, 128)]),
            "llama-3.1-70b" => (80, vec![attention((0..80).collect(), 8, 128)]),
            "qwen3-32b" => (64, vec![attention((0..64).collect(), 8, 128)]),
            "qwen3-235b" => (94, vec![attention((0..94).collect(), 4, 128)]),
            "deepseek-r1" => (61, vec![latent((0..61).collect(), 576, Dtype::Bf16)]),
            "gpt-oss-120b" => {
                let mut window = attention((0..36).step_by(2).collect(), 8, 64);
                window.name = "window".to_owned();
                window.extent = Extent::Window { tokens: 128 };
                (36, vec![window, attention((1..36).step_by(2).collect(), 8, 64)])
            }
            "qwen3-next" => {
                let delta: Vec<u32> = (0..48).filter(|layer| layer % 4 != 3).collect();
                // A convolution over 4 tokens keeps the last 3.
                let convolution = vec![heads("q", 16, 3 * 128), heads("k", 16, 3 * 128), heads("v", 32, 3 * 128)];
                let recurrent = vec![heads("state", 32, 128 * 128)];
                (
                    48,
                    vec![
                        attention((3..48).step_by(4).collect(), 2, 256),
                        state("convolution", delta.clone(), Dtype::Bf16, convolution),
                        state("recurrent", delta, Dtype::F32, recurrent),
                    ],
                )
            }
            "tiny" => (4, vec![attention((0..4).collect(), 4, 32)]),
            _ => return None,
        };
        Some(Model { name: name.to_owned(), layers, groups })
    }
}

fn attention(layers: Vec<u32>, kv_heads: u32, head_dim: u32) -> LayerGroup {
    keys_and_values(layers, kv_heads, head_dim, Dtype::Bf16)
}

/// Layers that keep K and V of every token.
pub(super) fn keys_and_values(layers: Vec<u32>, kv_heads: u32, head_dim: u32, dtype: Dtype) -> LayerGroup {
    let tensors = vec![heads("k", kv_heads, head_dim), heads("v", kv_heads, head_dim)];
    LayerGroup { name: "attention".to_owned(), layers, dtype, extent: Extent::Full, tensors }
}

/// Layers that keep one latent of every token, on every rank.
pub(super) fn latent(layers: Vec<u32>, elements: u32, dtype: Dtype) -> LayerGroup {
    let tensor = Tensor { name: "latent".to_owned(), heads: 1, elements, sharding: Sharding::Replicated };
    LayerGroup { name: "latent".to_owned(), layers, dtype, extent: Extent::Full, tensors: vec![tensor] }
}

fn state(name: &str, layers: Vec<u32>, dtype: Dtype, tensors: Vec<Tensor>) -> LayerGroup {
    LayerGroup { name: name.to_owned(), layers, dtype, extent: Extent::State, tensors }
}

fn heads(name: &str, heads: u32, elements: u32) -> Tensor {
    Tensor { name: name.to_owned(), heads, elements, sharding: Sharding::Heads }
}
