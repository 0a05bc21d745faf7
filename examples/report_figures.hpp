// SPDX-License-Identifier: MIT
/// \file
/// How the page of a report draws: kinds of figures.
#pragma once

/// Helpers and kinds of figures.
inline constexpr const char* kReportFigures = R"js(
"use strict";
const D=JSON.parse(document.getElementById("data").textContent);
const $=id=>document.getElementById(id);
const make=(tag,attributes,...inside)=>{const e=document.createElement(tag);
  for(const k in attributes||{})if(attributes[k]!=null)e.setAttribute(k,attributes[k]);
  e.append(...inside);return e};
const draw=(tag,attributes,text)=>{const e=document.createElementNS("http://www.w3.org/2000/svg",tag);
  for(const k in attributes||{})if(attributes[k]!=null)e.setAttribute(k,attributes[k]);
  if(text!=null)e.textContent=text;return e};
const hue=e=>Math.round((e*137.508+255)%360);
const solid=e=>`oklch(var(--sl) var(--sc) ${hue(e)})`;
const percent=v=>v==null?"–":(100*v).toFixed(v&&Math.abs(v)<.0995?2:1)+" %";
const short=v=>v==null?"–":Math.abs(v)>=1e4?v.toExponential(2):Math.abs(v)>=100?v.toFixed(0):
  Math.abs(v)>=10?v.toFixed(1):Math.abs(v)>=1?v.toFixed(2):v===0?"0":Math.abs(v)<.001?v.toExponential(1):v.toFixed(3);
const between=(e,f)=>e[1]==null?"":` (${f(e[1])} to ${f(e[2])})`;
/// A value, its interval, and on a line of its own what chance would give.
const stated=(e,f)=>f(e[0])+between(e,f)+(e[3]==null?"":`\nby chance: ${f(e[3])}`);
/// Cell i of a packed matrix: [value, low, high, chance], ten bits each.
const cells=p=>{const raw=atob(p.data);return i=>{const b=[0,1,2,3,4].map(j=>raw.charCodeAt(5*i+j));
  return [b[0]|(b[1]&3)<<8,b[1]>>2|(b[2]&15)<<6,b[2]>>4|(b[3]&63)<<4,b[3]>>6|b[4]<<2].map(c=>c===1023?null:c/1022*p.scale)}};
const tip=$("tip");
function showTip(text,x,y){tip.textContent=text;tip.style.visibility="visible";
  const w=tip.offsetWidth,h=tip.offsetHeight;
  tip.style.left=Math.max(6,Math.min(innerWidth-w-6,x+14))+"px";
  tip.style.top=(y+18+h>innerHeight?Math.max(6,y-h-12):y+18)+"px"}
const hideTip=()=>{tip.style.visibility="hidden"};
document.addEventListener("scroll",hideTip,true);
document.addEventListener("keydown",e=>{if(e.key==="Escape")hideTip()});
const say=text=>{$("say").textContent=text};

/// A figure with a heading, and its numbers as a table that is made when it is opened. It is drawn
/// once all its neighbours are there too, and widths are final.
const waiting=[];
const drawAll=()=>{for(const f of waiting.splice(0))f()};
function figure(parent,caption,points,table,build,note){
  const f=make("figure",{"data-points":points});parent.append(f);
  f.append(make("figcaption",{},caption));
  const holder=make("div",{"class":"scroll"});f.append(holder);waiting.push(()=>build(holder,Math.max(240,f.clientWidth)));
  if(note)f.append(note);
  if(table){const d=make("details",{},make("summary",{},"Numbers"));
    const fill=()=>{if(d.dataset.full)return;d.dataset.full=1;
      const {head,rows}=table();const t=make("table",{});
      t.append(make("thead",{},make("tr",{},...head.map(h=>make("th",{scope:"col"},h)))));
      const b=make("tbody",{});
      for(const r of rows)b.append(make("tr",{},...r.map((c,i)=>make(i?"td":"th",i?{}:{scope:"row"},c))));
      t.append(b);d.append(make("div",{"class":"scroll",tabindex:0,role:"region","aria-label":caption+": numbers"},t))};
    d.addEventListener("toggle",fill);f.append(d)}
  return f}

/// Cells of rows and columns. of(r,c) is [value, low, high, chance] of a cell, or null if there is
/// none. How many doublings it is above chance is the colour, on a scale that ends where the largest
/// ends, but between a factor of 1.4 and of 4. name(r,c) is what a cell is called.
function heat(parent,o){
  const R=o.rows.length,C=o.cols.length;
  const all=o.rows.map((_,r)=>o.cols.map((_,c)=>o.of(r,c)));
  const number=e=>e?percent(e[0])+between(e,percent):"",text=(r,c)=>o.name(r,c)+(all[r][c]?"\n"+stated(all[r][c],percent):"");
  const doublings=(r,c)=>{const e=all[r][c];return e?ratio(e[0],e[3]):null};
  const unsure=e=>e&&e[1]!=null&&e[3]!=null&&e[1]<=e[3]&&e[3]<=e[2];const dots=all.some(a=>a.some(unsure));
  let most=.5;for(let r=0;r<R;r++)for(let c=0;c<C;c++){const v=doublings(r,c);if(v!=null&&v<50&&v>-50)most=Math.max(most,Math.abs(v))}
  most=Math.min(2,Math.ceil(most*4)/4);const factor=Math.pow(2,most);const end=factor<3.9?factor.toFixed(1):"4";
  figure(parent,o.caption,R*C,()=>({head:[o.corner||"",...o.cols],
    rows:o.rows.map((r,i)=>[r,...all[i].map(number)])}),(holder,room)=>{
    const left=Math.min(120,12+6.2*Math.max(...o.rows.map(r=>String(r).length)));
    const w=Math.max(4.5,Math.min(o.square?34:64,(Math.min(room,o.width||1e4)-left-4)/C)),h=Math.max(5,Math.min(o.square?w:28,R>24?12:28));
    const W=left+C*w+2,H=R*h+20;
    const s=draw("svg",{viewBox:`0 0 ${W} ${H}`,role:"img",tabindex:0,style:`max-width:${Math.round(W)}px;min-width:${Math.round(Math.min(W,room-2))}px`,
      "aria-label":`${o.caption}. ${o.summary||""} Arrow keys go from cell to cell.`});
    const skipR=Math.ceil(11/h),skipC=Math.ceil(9*String(o.cols[C-1]).length/w);
    for(let r=0;r<R;r+=skipR){const t=draw("text",{x:left-6,y:r*h+h/2+4,"text-anchor":"end"},
      String(o.rows[r]).length>18?String(o.rows[r]).slice(0,17)+"…":o.rows[r]);s.append(t)}
    for(let c=0;c<C;c+=skipC)s.append(draw("text",{x:left+c*w+w/2,y:R*h+14,"text-anchor":"middle"},o.cols[c]));
    for(let r=0;r<R;r++)for(let c=0;c<C;c++){const x=doublings(r,c),v=x==null?null:Math.max(-1,Math.min(1,x/most));
      s.append(draw("rect",{x:left+c*w,y:r*h,width:w,height:h,"data-r":r,"data-c":c,
        "class":"cell "+(v==null?"zero":v>0?"more":v<0?"less":"base"),
        "fill-opacity":v==null||v===0?null:Math.abs(v).toFixed(3)}));
      if(unsure(all[r][c]))s.append(draw("circle",{"class":"unsure",cx:left+c*w+w/2,cy:r*h+h/2,r:Math.min(2,h/6,w/6).toFixed(1)}))}
    const cursor=draw("rect",{"class":"cursor",width:w,height:h});s.append(cursor);
    let at=[0,0];
    const place=(r,c,x,y,aloud)=>{at=[r,c];cursor.setAttribute("x",left+c*w);cursor.setAttribute("y",r*h);
      cursor.style.visibility="visible";showTip(text(r,c),x,y);if(aloud)say(text(r,c))};
    s.addEventListener("pointermove",e=>{const t=e.target;if(t.dataset.r!=null)place(+t.dataset.r,+t.dataset.c,e.clientX,e.clientY)});
    s.addEventListener("pointerdown",e=>{const t=e.target;if(t.dataset.r!=null)place(+t.dataset.r,+t.dataset.c,e.clientX,e.clientY)});
    const out=()=>{cursor.style.visibility="hidden";hideTip()};
    s.addEventListener("pointerleave",out);s.addEventListener("blur",out);
    s.addEventListener("keydown",e=>{const d={ArrowUp:[-1,0],ArrowDown:[1,0],ArrowLeft:[0,-1],ArrowRight:[0,1]}[e.key];
      if(!d)return;e.preventDefault();const r=Math.max(0,Math.min(R-1,at[0]+d[0])),c=Math.max(0,Math.min(C-1,at[1]+d[1]));
      const box=s.getBoundingClientRect(),k=box.width/W;place(r,c,box.left+(left+c*w+w)*k,box.top+(r*h+h)*k,true)});
    holder.append(s)},make("p",{"class":"small soft"},`${end} times less`,make("span",{"class":"ramp"}),`${end} times more than ${o.than}${dots?" · a dot: chance is within the interval":""}`))}

/// In doublings: 0 for chance.
const ratio=(v,chance)=>v==null||!chance?null:v===0?-99:Math.log2(v/chance);

/// Curves over layers, positions or steps. series: {name, points:[[v,low,high,chance]], color, dash}.
/// `chance` is one dashed line for all; with `own`, each series has one of its own.
function curves(parent,o){
  if(o.chance&&o.chance.every(c=>c==null))o.chance=null;
  const own=o.own?"by chance":null;
  const n=o.x.length,H=200,L=52,B=26,T=8,Rt=12;
  const values=[];for(const s of o.series)for(const p of s.points)if(p)for(const v of p.slice(0,own?4:3))if(v!=null)values.push(v);
  for(const c of o.chance||[])if(c!=null)values.push(c);
  if(!values.length)return;
  let lo=o.zero===false?Math.min(...values):0,hi=Math.max(...values);
  if(o.most!=null)hi=Math.min(hi,o.most);
  if(hi-lo<1e-12)hi=lo+(lo?Math.abs(lo)*.1:1);
  const step=Math.pow(10,Math.floor(Math.log10((hi-lo)/4)));const nice=[1,2,2.5,5,10].map(f=>f*step).find(q=>(hi-lo)/q<=4.5);
  lo=Math.floor(lo/nice+1e-9)*nice;hi=Math.ceil(hi/nice-1e-9)*nice;
  const tick=v=>o.format===percent?+(100*v).toFixed(6)+" %":Math.abs(v)>=1e4?(v/1e3).toFixed(0)+"k":String(+v.toPrecision(6));
  let W=0;
  const X=i=>n===1?(L+W-Rt)/2:L+i*(W-L-Rt)/(n-1),Y=v=>T+(H-B-T)*(1-(Math.min(v,hi)-lo)/(hi-lo));
  const says=i=>`${o.label||"Layer"} ${o.x[i]}\n`+o.series.map(s=>s.points[i]&&s.points[i][0]!=null?
    `${s.name}: ${own?stated(s.points[i],o.format):o.format(s.points[i][0])+between(s.points[i],o.format)}`:`${s.name}: –`).join("\n")+
    (o.chance&&o.chance[i]!=null?`\n${o.chanceName||"by chance"}: ${o.format(o.chance[i])}`:"");
  figure(parent,o.caption,values.length,()=>({head:[o.label||"Layer",...o.series.flatMap(s=>[s.name,"from","to",...(own?[own]:[])]),...(o.chance?[o.chanceName||"by chance"]:[])],
    rows:o.x.map((x,i)=>[String(x),...o.series.flatMap(s=>(own?[0,1,2,3]:[0,1,2]).map(j=>s.points[i]&&s.points[i][j]!=null?o.format(s.points[i][j]):"–")),
      ...(o.chance?[o.chance[i]==null?"–":o.format(o.chance[i])]:[])])}),(holder,room)=>{
    W=Math.min(room,680);
    const s=draw("svg",{viewBox:`0 0 ${W} ${H}`,style:`max-width:${W}px`,role:"img",tabindex:0,"aria-label":`${o.caption}. ${o.summary||""} Arrow keys go along the curve.`});
    for(let v=lo;v<=hi+nice/2;v+=nice){s.append(draw("line",{"class":"axis",x1:L,x2:W-Rt,y1:Y(v),y2:Y(v)}));
      s.append(draw("text",{x:L-6,y:Y(v)+4,"text-anchor":"end"},tick(v)))}
    const skip=Math.ceil(n*String(o.x[n-1]).length*8/(W-L));
    for(let i=0;i<n;i+=skip)s.append(draw("text",{x:X(i),y:H-8,"text-anchor":"middle"},o.x[i]));
    const path=f=>{let p="",on=false;for(let i=0;i<n;i++){const v=f(i);if(v==null){on=on&&!!o.join;continue}p+=(on?"L":"M")+X(i).toFixed(1)+" "+Y(v).toFixed(1);on=true}return p};
    for(const r of o.series){
      const up=[],down=[];for(let i=0;i<n;i++){const p=r.points[i];if(p&&p[1]!=null){up.push(X(i).toFixed(1)+","+Y(p[2]).toFixed(1));down.unshift(X(i).toFixed(1)+","+Y(p[1]).toFixed(1))}}
      if(up.length>1)s.append(draw("polygon",{"class":"band",points:[...up,...down].join(" "),style:`fill:${r.color}`}));
      else if(n===1&&r.points[0]&&r.points[0][1]!=null)s.append(draw("line",{x1:X(0),x2:X(0),y1:Y(r.points[0][1]),y2:Y(r.points[0][2]),style:`stroke:${r.color};stroke-width:6;opacity:.3`}));
      if(own){s.append(draw("path",{"class":"chance",d:path(i=>r.points[i]&&r.points[i][3]),style:`stroke:${r.color}`}));
        if(n===1&&r.points[0]&&r.points[0][3]!=null)s.append(draw("line",{"class":"chance",x1:L,x2:W-Rt,y1:Y(r.points[0][3]),y2:Y(r.points[0][3]),style:`stroke:${r.color}`}))}
      s.append(draw("path",{"class":"series",d:path(i=>r.points[i]&&r.points[i][0]),style:`stroke:${r.color}`,"stroke-dasharray":r.dash||null}));
      if(r.points.filter(p=>p&&p[0]!=null).length<=40)for(let i=0;i<n;i++)if(r.points[i]&&r.points[i][0]!=null)s.append(draw("circle",{cx:X(i),cy:Y(r.points[i][0]),r:3,style:`fill:${r.color}`}))}
    if(o.chance){s.append(draw("path",{"class":"chance",d:path(i=>o.chance[i])}));
      if(n===1&&o.chance[0]!=null)s.append(draw("line",{"class":"chance",x1:L,x2:W-Rt,y1:Y(o.chance[0]),y2:Y(o.chance[0])}))}
    const guide=draw("line",{"class":"guide",y1:T,y2:H-B});s.append(guide);
    s.append(draw("rect",{x:L-8,y:0,width:W-L,height:H-B,fill:"transparent"}));
    let at=0;
    const place=(i,x,y,aloud)=>{at=i;guide.setAttribute("x1",X(i));guide.setAttribute("x2",X(i));guide.style.visibility="visible";showTip(says(i),x,y);if(aloud)say(says(i))};
    const under=e=>{const b=s.getBoundingClientRect();const x=(e.clientX-b.left)*W/b.width;
      place(Math.max(0,Math.min(n-1,Math.round(n===1?0:(x-L)/(W-L-Rt)*(n-1)))),e.clientX,e.clientY)};
    s.addEventListener("pointermove",under);s.addEventListener("pointerdown",under);
    const out=()=>{guide.style.visibility="hidden";hideTip()};s.addEventListener("pointerleave",out);s.addEventListener("blur",out);
    s.addEventListener("keydown",e=>{const d={ArrowLeft:-1,ArrowRight:1}[e.key];if(!d)return;e.preventDefault();
      const i=Math.max(0,Math.min(n-1,at+d)),b=s.getBoundingClientRect();place(i,b.left+X(i)*b.width/W,b.top+b.height/2,true)});
    holder.append(s)},make("ul",{"class":"key"},...o.series.map(r=>make("li",{},make("i",{style:`border-color:${r.color}${r.dash?";border-top-style:dashed":""}`}),r.name)),
      ...(o.chance||own?[make("li",{},make("i",{"class":"dash"}),o.chanceName||own||"by chance")]:[])))}

/// Experts of successive layers, and the tokens between them.
function flow(parent,caption,model){
  const F=model.flow;if(!F||!F.length)return;
  const layers=[F[0].from,...F.map(f=>f.to)],H=320,pad=3;
  let count=0;for(const f of F)count+=f.links.length;
  figure(parent,caption,count,()=>({head:["from layer","expert","to layer","expert","tokens","share of the expert's","by chance"],
    rows:F.flatMap(f=>f.links.map(([e,g,n,q])=>[model.layers[f.from].name,String(e),model.layers[f.to].name,String(g),String(n),percent(q[0])+between(q,percent),percent(q[3])]))}),(holder,room)=>{
    const W=Math.max(room,64*layers.length),step=(W-60)/(layers.length-1);
    const s=draw("svg",{viewBox:`0 0 ${W} ${H+22}`,role:"img",tabindex:0,style:`width:${W}px;max-width:none`,
      "aria-label":caption+". Each band is the tokens that go from an expert of one layer to an expert of the next. Arrow keys go from expert to expert; all numbers are in the table below."});
    const columns=layers.map(l=>{const E=model.layers[l].experts,load=new Array(E).fill(0);return{l,E,load}});
    F.forEach((f,i)=>{f.out.forEach((n,e)=>columns[i].load[e]=n);f.into.forEach((n,e)=>columns[i+1].load[e]=n)});
    columns.forEach((c,i)=>{const sum=c.load.reduce((a,b)=>a+b,0)||1,gap=c.E>24?1:pad,room=H-gap*(c.E-1);let y=0;
      c.y=[];c.h=[];c.x=30+i*step;for(let e=0;e<c.E;e++){const h=room*c.load[e]/sum;c.y.push(y);c.h.push(h);y+=h+gap}c.scale=room/sum;
      c.a=c.y.slice();c.b=c.y.slice()});
    const links=[],boxes=columns.map(()=>[]);
    F.forEach((f,i)=>{const A=columns[i],B=columns[i+1];
      for(const [e,g,n,q] of f.links.slice().sort((p,q)=>p[0]-q[0]||p[1]-q[1])){const ha=n*A.scale,hb=n*B.scale;
        const y1=A.a[e]+ha/2,y2=B.b[g]+hb/2;A.a[e]+=ha;B.b[g]+=hb;const x1=A.x+7,x2=B.x-7,m=(x1+x2)/2;
        const p=draw("path",{"class":"link",d:`M${x1} ${y1.toFixed(1)}C${m} ${y1.toFixed(1)} ${m} ${y2.toFixed(1)} ${x2} ${y2.toFixed(1)}`,
          style:`stroke:${solid(e)};stroke-width:${Math.max(.4,(ha+hb)/2).toFixed(2)}`});
        links.push({p,i,e,g,n});p.dataset.say=`${model.layers[f.from].name} expert ${e} → ${model.layers[f.to].name} expert ${g}\n${n} tokens, of those of expert ${e}: ${stated(q,percent)}`;s.append(p)}});
    columns.forEach((c,i)=>{for(let e=0;e<c.E;e++){const r=draw("rect",{x:c.x-7,y:c.y[e].toFixed(1),width:14,height:Math.max(.5,c.h[e]).toFixed(1),rx:2,style:`fill:${solid(e)}`});
        r.dataset.say=`${model.layers[c.l].name}, expert ${e}\n${c.load[e]} tokens`;r.dataset.i=i;r.dataset.e=e;boxes[i].push(r);s.append(r);
        if(c.h[e]>12&&c.E<=24)s.append(draw("text",{x:c.x+(i===columns.length-1?-11:11),y:c.y[e]+c.h[e]/2+4,"text-anchor":i===columns.length-1?"end":"start"},e))}
      s.append(draw("text",{x:c.x,y:H+16,"text-anchor":i===0?"start":i===columns.length-1?"end":"middle","dx":i===0?-7:i===columns.length-1?7:0},model.layers[c.l].name.replace(/^layers\./,"layer ").replace(/\.moe$/,"")))});
    const light=t=>{s.classList.add("flow-on");
      for(const k of links)k.p.classList.toggle("on",k.p===t||(t.dataset.e!=null&&((k.i==t.dataset.i&&k.e==t.dataset.e)||(k.i==t.dataset.i-1&&k.g==t.dataset.e))))};
    const out=()=>{s.classList.remove("flow-on");hideTip()};
    s.addEventListener("pointermove",e=>{const t=e.target;if(!t.dataset.say)return out();showTip(t.dataset.say,e.clientX,e.clientY);light(t)});
    s.addEventListener("pointerleave",out);s.addEventListener("blur",out);
    let at=[0,0];
    s.addEventListener("keydown",e=>{const d={ArrowUp:[0,-1],ArrowDown:[0,1],ArrowLeft:[-1,0],ArrowRight:[1,0]}[e.key];if(!d)return;e.preventDefault();
      const i=Math.max(0,Math.min(columns.length-1,at[0]+d[0])),g=Math.max(0,Math.min(columns[i].E-1,at[1]+d[1]));at=[i,g];
      const t=boxes[i][g],box=t.getBoundingClientRect();light(t);
      const next=links.filter(k=>k.i===i&&k.e===g).sort((p,q)=>q.n-p.n).slice(0,3).map(k=>`\n→ ${model.layers[columns[i+1].l].name} expert ${k.g}: ${k.n} tokens`).join("");
      showTip(t.dataset.say+next,box.right,box.top);say(t.dataset.say+next)});
    holder.append(s)},F.some(f=>f.shown<1)?make("p",{"class":"small soft"},`The largest bands are drawn: ${percent(Math.min(...F.map(f=>f.shown)))} of the tokens or more.`):null)}
)js";
