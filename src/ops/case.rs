//! Cases: an op with operand shapes and values, written as `conv2d(n=2,h=14,w=14,c=3,k=8)`. That string is the test's
//! name, the bench's name, the label in a trace and an argument on the command line.

use super::{Op, Room};
use crate::graph::Spec;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

/// How an operand of a case is filled, from the case's seed.
#[derive(Clone, PartialEq, Debug)]
pub enum Fill {
    /// Standard normal times this.
    Normal(f32),
    /// Uniform in the range.
    Uniform(f32, f32),
    /// Class labels below this count.
    Labels(u32),
    /// These values.
    F32(Vec<f32>),
    /// These values.
    U32(Vec<u32>),
}

/// One operand of a case.
#[derive(Clone, Debug)]
pub struct Operand {
    /// Shape and type.
    pub spec: Spec,
    /// Values.
    pub fill: Fill,
    /// The op is differentiated with respect to it.
    pub grad: bool,
}

/// An op with its operands.
#[derive(Clone, Debug)]
pub struct Case {
    /// The op.
    pub op: Arc<dyn Op>,
    /// Its operands in order.
    pub operands: Vec<Operand>,
    /// Results that get a random cotangent; the others (saved statistics, argmax) are compared forward only.
    pub differentiable: Vec<usize>,
    /// Half-width of the central differences that the reference's gradient is held to.
    pub step: f64,
    /// How many times the usual error is allowed: above 1 where rounding an intermediate result, a large score before
    /// its exponential, moves the results by more than the rounding itself.
    pub condition: f64,
}

impl Case {
    /// A case with one differentiable result (the first) and no operands yet.
    pub fn new(op: impl Op) -> Self {
        Case {
            op: Arc::new(op),
            operands: vec![],
            differentiable: vec![0],
            step: 1e-5,
            condition: 1.0,
        }
    }

    /// Appends a float operand of standard-normal values that is differentiated.
    pub fn x(self, shape: &[usize]) -> Self {
        self.operand(Spec::f32(shape), Fill::Normal(1.0), true)
    }

    /// [`x`](Self::x) where `present`.
    pub fn x_if(self, present: bool, shape: &[usize]) -> Self {
        if present { self.x(shape) } else { self }
    }

    /// Appends an operand that is not differentiated.
    pub fn fixed(self, spec: Spec, fill: Fill) -> Self {
        self.operand(spec, fill, false)
    }

    /// Appends an operand.
    pub fn operand(mut self, spec: Spec, fill: Fill, grad: bool) -> Self {
        self.operands.push(Operand { spec, fill, grad });
        self
    }

    /// Only the forward direction is checked.
    pub fn forward_only(mut self) -> Self {
        self.differentiable.clear();
        self
    }
}

/// The parameters of a case string. Reading a key takes it; [`finish`](Self::finish) refuses what nobody read.
#[derive(Clone, Debug)]
pub struct Params {
    given: BTreeMap<String, String>,
    known: Vec<&'static str>,
}

impl Params {
    /// Parses `k=v,k=v`; an empty string has no parameters.
    ///
    /// # Errors
    /// A part without `=`, or a key given twice.
    pub fn parse(text: &str) -> Result<Self> {
        let mut given = BTreeMap::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (k, v) = part.split_once('=').ok_or_else(|| {
                Error::input(format!("`{part}` in a case is not of the form key=value"))
            })?;
            if given
                .insert(k.trim().to_string(), v.trim().to_string())
                .is_some()
            {
                return Err(Error::input(format!("`{k}` is given twice in a case")));
            }
        }
        Ok(Params {
            given,
            known: vec![],
        })
    }

    /// The value of `key`, or `default`.
    ///
    /// # Errors
    /// The value does not parse.
    pub fn get<T: FromStr>(&mut self, key: &'static str, default: T) -> Result<T> {
        self.known.push(key);
        match self.given.remove(key) {
            None => Ok(default),
            Some(v) => v
                .parse()
                .map_err(|_| Error::input(format!("`{v}` is not a value for `{key}`"))),
        }
    }

    /// A 0/1 switch.
    ///
    /// # Errors
    /// The value is neither 0 nor 1.
    pub fn flag(&mut self, key: &'static str) -> Result<bool> {
        match self.get(key, 0u8)? {
            0 => Ok(false),
            1 => Ok(true),
            v => Err(Error::input(format!("`{key}` is 0 or 1, not {v}"))),
        }
    }

    /// Refuses keys that nobody read.
    ///
    /// # Errors
    /// There is one: the message lists the known keys.
    pub fn finish(self) -> Result<()> {
        match self.given.keys().next() {
            None => Ok(()),
            Some(k) => Err(Error::input(format!(
                "unknown parameter `{k}`; known: {}",
                self.known.join(", ")
            ))),
        }
    }
}

impl Room {
    /// The case for a parameter string of this room.
    ///
    /// # Errors
    /// A parameter is unknown, malformed, or the shape rule refuses the operands.
    pub fn build(&self, params: &str) -> Result<Case> {
        let of = |e: Error| e.context(format!("{}({params})", self.name));
        let mut p = Params::parse(params).map_err(of)?;
        let case = (self.case)(&mut p).map_err(of)?;
        p.finish().map_err(of)?;
        let specs: Vec<Spec> = case.operands.iter().map(|o| o.spec.clone()).collect();
        case.op.infer(&specs).map_err(|why| of(Error::input(why)))?;
        Ok(case)
    }
}
